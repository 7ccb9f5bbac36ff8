"""The parts of a layer: of each a record of sizes and options, and the module that the engine runs."""
