"""Copies those of a fuzzer's inputs into a folder that reach much that no input kept there reaches.

keep.py CONTROL_FILE FOLDER: the control file is what libFuzzer's set cover merge notes of each input: its size and the
features (places in the program) that it reaches. An input is kept for at least LEAST_NEW new ones, the most for its size first:
a merge's own choice, every input with one new feature, is ten times as large.
"""

import shutil
import sys
from pathlib import Path

LEAST_NEW = 10
# What a file costs beside its bytes.
FILE_BYTES = 200


def reached(control_file):
    """Every input's path with its size and its features."""
    count, _, *lines = control_file.read_text().splitlines()
    paths, notes = lines[: int(count)], [line.split() for line in lines[int(count) :]]
    sizes = {words[1]: int(words[2]) for words in notes if words[0] == "STARTED"}
    return {
        Path(paths[int(words[1])]): (sizes[words[1]], set(words[2:])) for words in notes if words[0] == "FT"
    }


def main(control_file, folder):
    inputs = reached(control_file)
    known = set().union(*(features for path, (_, features) in inputs.items() if path.parent == folder))
    while True:
        useful = {
            path: len(features - known) / (size + FILE_BYTES)
            for path, (size, features) in inputs.items()
            if len(features - known) >= LEAST_NEW
        }
        if not useful:
            return
        best = max(useful, key=useful.get)
        known |= inputs[best][1]
        shutil.copy(best, folder)


main(Path(sys.argv[1]), Path(sys.argv[2]))
