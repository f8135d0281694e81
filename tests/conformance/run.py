"""Runs the conformance cases on distill_jax and on other libraries, and prints how many are right.

python tests/conformance/run.py                          # every library that can be imported
python tests/conformance/run.py --library ours optax
python tests/conformance/run.py --write docs/results/conformance.md
"""

import argparse
import datetime
import inspect
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from conformance.libraries import LIBRARIES

CASES = Path(__file__).with_name("cases.json")
BEGIN, END = "<!-- table: made by tests/conformance/run.py -->", "<!-- end of the table -->"


def load():
    """Reads the groups of cases. Numbers that JSON does not have are strings there."""
    data = json.loads(CASES.read_text(encoding="utf-8"))
    for group in data["groups"]:
        group["cases"] = [{**group["options"], **numbers(case)} for case in group["cases"]]
        group["bounds"] = data["tolerances"][group["tolerance"]]
    return data["groups"]


def numbers(x):
    if isinstance(x, dict):
        return {k: v if k == "reduce" else numbers(v) for k, v in x.items()}
    if isinstance(x, list):
        return [numbers(v) for v in x]
    return float(x) if x in ("inf", "-inf", "nan") else x


def faults(group, case, result):
    """Says what is wrong with a result: a list of words, empty if value and gradient are right."""
    if isinstance(result, Exception):
        return [f"raises {type(result).__name__}"]
    value, gradient = result
    temperature = np.max(case.get("temperature", 1.0))
    (relative, absolute), (relative_slope, absolute_slope) = group["bounds"]
    found = []
    expected = case["value"]
    bound = relative * abs(expected) + absolute * temperature**2 if math.isfinite(expected) else 0.0
    if not (value == expected or abs(value - expected) <= bound):
        found.append(f"value {described(value, expected)}")
    slopes = case["gradient"]
    if slopes is not None and not np.isfinite(gradient).all():
        found.append("gradient NaN" if np.isnan(gradient).any() else "gradient infinite")
    elif slopes not in (None, "finite"):
        slopes = np.asarray(slopes, float)
        bound = relative_slope * np.abs(slopes).max() + absolute_slope * temperature
        if (np.abs(np.subtract(gradient, slopes)) > bound).any():
            found.append("gradient 0" if not np.any(gradient) else "gradient off")
    return found


def described(value, expected):
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite"
    digits = 3 if f"{value:.3g}" != f"{expected:.3g}" else 6
    return f"{value:.{digits}g} for {expected:.{digits}g}"


def run(library, groups):
    """Runs cases: a list of (group, number of the case, None where not offered, or the faults)."""
    outcomes = []
    for group in groups:
        for i, case in enumerate(group["cases"]):
            results = library.results(group["loss"], group["dtype"], case)
            found = [faults(group, case, result) for result in results]
            outcomes.append((group, i, min(found, key=len) if found else None))
    return outcomes


def counts(outcomes):
    kinds = Counter("not offered" if f is None else "wrong" if f else "right" for _, _, f in outcomes)
    return kinds["right"], kinds["wrong"], kinds["not offered"]


def wrong_by_group(outcomes):
    """{name of the group: (wrong cases, offered cases, what was seen, what it means)}."""
    table = {}
    for group, _, found in outcomes:
        if found is not None:
            wrong, offered, seen, _ = table.get(group["name"], (0, 0, [], ""))
            table[group["name"]] = (wrong + bool(found), offered + 1, seen + found, group["wrong"])
    return {name: row for name, row in table.items() if row[0]}


def summary(seen):
    """A few words for all faults of a group: each kind once, a value that is off by its worst example."""
    off = [fault for fault in seen if " for " in fault]
    words = [f"{max(off, key=distance)} ({len(off)}×)"] if off else []
    rest = Counter(fault for fault in seen if fault not in off)
    return ", ".join(words + [f"{fault} ({number}×)" for fault, number in rest.items()])


def distance(fault):
    """How far "value 1.2 for 1.1" is off, relative to the expected value."""
    value, expected = float(fault.split()[1]), float(fault.split()[3])
    return abs(value - expected) / max(abs(expected), 1e-30)


def markdown(results, missing):
    lines = [BEGIN, ""]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=CASES.parent
    )
    total = len(next(iter(results.values()))[1])
    lines += [f"{total} cases, run on {datetime.date.today()} at commit `{commit.stdout.strip()}`.", ""]
    lines += ["| library | versions | right | wrong | not offered |", "| --- | --- | ---: | ---: | ---: |"]
    for library, outcomes in results.values():
        right, wrong, absent = counts(outcomes)
        lines.append(f"| {library.title} | {library.versions()} | {right} | {wrong} | {absent} |")
    lines += [
        f"| {LIBRARIES[name].title} | cannot be imported: {why} | | | |" for name, why in missing.items()
    ]
    for library, outcomes in results.values():
        lines += ["", f"### {library.title}", "", inspect.getdoc(library), ""]
        table = wrong_by_group(outcomes)
        if not table:
            lines.append("Every case that it offers is right.")
            continue
        lines += ["| cases | wrong / offered | seen | what it means |", "| --- | ---: | --- | --- |"]
        for name, (wrong, offered, seen, meaning) in table.items():
            lines.append(f"| {name} | {wrong} / {offered} | {summary(seen)} | {meaning} |")
    return "\n".join([*lines, "", END])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--library", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), help="which to run"
    )
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="a Markdown page whose table is to be replaced"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write each case's outcome")
    options = parser.parse_args()
    results, missing = {}, {}
    for name in options.library:
        library = LIBRARIES[name]()
        try:
            library.routes  # imports the library
        except ImportError as error:
            missing[name] = str(error)
            print(f"{library.title}: cannot be imported ({error})")
            continue
        outcomes = run(library, load())
        results[name] = library, outcomes
        print("{}: {} right, {} wrong, {} not offered".format(library.title, *counts(outcomes)))
        for group, (wrong, offered, seen, _) in wrong_by_group(outcomes).items():
            print(f"    {group}: {wrong} of {offered} wrong: {summary(seen)}")
    if options.json:
        report = {
            name: [
                {"group": group["name"], "case": i, "offered": found is not None, "faults": found or []}
                for group, i, found in outcomes
            ]
            for name, (_, outcomes) in results.items()
        }
        options.json.write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    if options.write and results:
        before, _, rest = options.write.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        options.write.write_text(before + markdown(results, missing) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
