"""Writes the page "What holds for every loss" from the rules and exceptions that tests/test_loss_contract.py tests."""

import tomllib
from pathlib import Path

CONTRACT = Path(__file__).resolve().parents[1] / "tests" / "loss_contract.toml"


def write(file: Path) -> None:
    """Writes the page as Markdown, if it is new or has changed."""
    contract = tomllib.loads(CONTRACT.read_text(encoding="utf-8"))
    lines = [
        "# What holds for every loss",
        "",
        "These rules are tested for every public loss, eagerly, under `jax.jit` and under `jax.vmap`. This page is",
        "made from the file that the test reads. An exception that is no longer needed fails the test.",
        "",
        "| case | rule |",
        "| --- | --- |",
        *(f"| {case} | {rule} |" for case, rule in contract["rules"].items()),
        "",
        "## Exceptions",
        "",
        "| loss | case | reason |",
        "| --- | --- | --- |",
    ]
    for entry in contract["exception"]:
        names = ", ".join(f"`losses.{name}`" for name in entry["losses"])
        lines.append(f"| {names} | {entry['case']} | {entry['reason']} |")
    lines += ["", "## What is no loss", "", "| name | what it is |", "| --- | --- |"]
    lines += [f"| `losses.{name}` | {what} |" for name, what in contract["no_loss"].items()]
    text = "\n".join(lines) + "\n"
    file.parent.mkdir(exist_ok=True)
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
