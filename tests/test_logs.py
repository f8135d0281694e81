import json
import time

import jax
import jax.numpy as jnp
import pytest
from harness import logs, runs


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_are_written_at_once(tmp_path):
    sink = logs.JsonLines(tmp_path / "seed0" / "teacher.jsonl")
    sink.write(1, {"loss": 0.5})
    assert lines(sink.path) == [{"epoch": 1, "loss": 0.5}]
    sink.close()


@pytest.mark.parametrize("rest", ["", '{"epoch": 5, "lo', "{\n", "[]\n", '{"epoch": null}\n'])
def test_a_continued_training_replaces_the_epochs_that_it_repeats(tmp_path, rest):
    path = tmp_path / "teacher.jsonl"
    first = logs.JsonLines(path)
    for epoch in (1, 2, 3, 4):
        first.write(epoch, {"loss": 1.0})
    first.close()
    with path.open("a") as file:
        file.write(rest)
    second = logs.JsonLines(path)
    for epoch in (5, 6) if rest else (3, 4, 5):  # from the checkpoint of that epoch, which fit reports again
        second.write(epoch, {"loss": 2.0})
    second.close()
    kept = (
        [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)] if rest else [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]
    )
    assert [(line["epoch"], line["loss"]) for line in lines(path)] == kept


def test_the_pulse_speaks_where_nothing_else_does(capsys, monkeypatch):
    monkeypatch.setattr(logs, "QUIET_SECONDS", 2.1)
    pulse = logs.Pulse()
    pulse.doing = "labelling"
    with pulse.beating(needed=True):
        time.sleep(2.5)
    said = capsys.readouterr().out.splitlines()
    assert said
    assert all(line.startswith("labelling (") for line in said)


def test_the_pulse_is_silent_beside_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(logs, "QUIET_SECONDS", 0.0)
    with logs.Pulse().beating(needed=False):
        time.sleep(1.2)
    assert not capsys.readouterr().out


def test_a_counter_tells_the_pulse_how_much_is_done(monkeypatch):
    monkeypatch.setattr(logs, "pulse", logs.Pulse())
    progress = logs.counter("labels")
    said = [logs.pulse.doing]
    for done in (3, 5):
        progress(done, 5)
        said.append(logs.pulse.doing)
    assert said == ["labels", "labels: 3 of 5", "after labels"]
    logs.counter("labels")(5, 5)  # all at once, as of a store whose last file was missing
    assert logs.pulse.doing == "after labels"


def test_a_profile_of_the_second_epoch_is_read_back(tmp_path):
    product = jax.jit(lambda x: jnp.tanh(x @ x))
    x = product(jnp.ones((300, 300)))
    profile = logs.Profile(tmp_path / "profile")
    for epoch in (1, 2):
        jax.block_until_ready(product(x))
        profile.write(epoch, {})
    profile.close()
    table = logs.profile_table(tmp_path / "profile").splitlines()
    counts = [
        int(row.split("|")[2]) for row in table if row.startswith("|") and row.split("|")[2].strip().isdigit()
    ]
    assert counts
    assert set(counts) == {1}  # the product of the first epoch is not in it
    assert all(
        runs.WRITTEN.fullmatch(path.relative_to(tmp_path).as_posix())
        for path in tmp_path.rglob("*.*")
        if path.is_file()
    )


def test_a_training_without_a_second_epoch_has_no_profile(tmp_path):
    assert "at least two epochs" in logs.profile_table(tmp_path)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(ValueError, match=rf"--log {name} needs .*pip install 'distill_jax\[log\]'"):
            logs.open_sinks([name], tmp_path, "seed0/teacher")
