"""`lockstep bench`: what is measured (suites), against what (peers, physical bounds), and how it is written down."""
