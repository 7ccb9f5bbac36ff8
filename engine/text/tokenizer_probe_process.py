"""The program of tokenizer_probe.py: cuts texts as parts of a tokenizer do, and says "done".

It imports nothing of lockstep.
"""

import json
import resource
import sys

from tokenizers import Tokenizer

LENGTH = 240
# Beside what a pattern names, one of each class that patterns ask for.
CLASSES = ["a", "B", "1", " ", "\n", "\t", "_", "!", "\u00e9", "\u0301", "\u6f22", "'"]


def texts(seeds, characters):
    """Runs that a pattern may follow far, and then not match: what it needs behind them comes later, or never."""
    for seed in dict.fromkeys([*CLASSES, "a ", "aB", "a1", " \n", "a!", *seeds]):
        run = seed * (LENGTH // len(seed))
        yield from (run, run + "!", f"A{run}\u0000{characters}")


def main():
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    job = json.load(sys.stdin)
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    parts = {"normalizer": None, "pre_tokenizer": None, "decoder": None, **job["parts"]}
    state = {"version": "1.0", "added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
    tokenizer = Tokenizer.from_str(json.dumps({**state, **parts, "model": empty}))
    for text in texts(job["seeds"], job["characters"]):
        tokenizer.encode(text)
        if tokenizer.decoder is not None:
            tokenizer.decoder.decode([text])
    print("done")


if __name__ == "__main__":
    main()
