"""Which goals are missed: `python -m benchmarks.check` prints each row of benchmarks/results/ that misses its goal."""

import json
import operator
import sys

from benchmarks.results_file import RESULTS

COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def missed(row: dict) -> bool:
    """True if the row states a goal ("OP NUMBER") and its value does not meet it."""
    if "goal" not in row:
        return False
    sign, bound = row["goal"].split()
    return not COMPARE[sign](row["value"], float(bound))


def main() -> int:
    """0 when every goal is met, else 1."""
    count = 0
    for path in sorted(RESULTS.glob("*.json")):
        for row in json.loads(path.read_text())["rows"]:
            if missed(row):
                count += 1
                print(f"{path.name}: {row['name']} is {row['value']:.4g} {row['unit']}, goal {row['goal']}")
    print(f"{count} goals missed")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
