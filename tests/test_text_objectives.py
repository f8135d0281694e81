"""Language models in training: word-level, sequence-level and on-policy distillation, and labels per token."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import losses, models, teachers, train
from distill_jax.data import text
from distill_jax.losses import chunks
from distill_jax.losses.tokens import bucketed, top_k
from distill_jax.teachers import kinds

V, LENGTH, PROMPT = 11, 8, 3
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(0, V - 1, n) for n in (9, 4, 12, 17, 3, 8, 8, 8)]
IMAGE = text.pack(TEXTS, LENGTH, begin=V - 1)
ROWS = len(IMAGE["tokens"])
WEIGHT = np.asarray(train.token_weight(IMAGE))


@functools.cache
def network(seed, width=8):
    config = models.TransformerConfig(vocabulary=V, width=width, layers=1, heads=2, hidden=8)
    model = models.build_transformer(config, jax.random.key(seed))
    return model.replace(params=jax.tree.map(lambda x: 8 * x, model.params))  # far from uniform


STUDENT, TEACHER = network(0), network(1)
TX = optax.sgd(0.1)
SAMPLER = functools.partial(models.generate, length=LENGTH - PROMPT)
ORDER = np.array([[0, 1, 2, 3]], np.int32)


def one_step(loss_fn, transform=None, teacher=TEACHER, data=None):
    epoch = train.make_epoch(train.make_train_step(loss_fn, TX), transform=transform)
    state = train.init_state(STUDENT, TX, jax.random.key(5))
    data = {"image": IMAGE, "weight": WEIGHT} if data is None else data
    state, metrics = epoch(state, jax.tree.map(jnp.asarray, data), ORDER, teacher)
    return state.model.params, metrics["loss"][0]


def same(a, b, **tolerance):
    if tolerance:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)
    else:
        jax.tree.map(np.testing.assert_array_equal, a, b)


def online(context, batch, key):
    return teachers.label(context, batch)


@functools.cache
def word_level():
    return one_step(train.distill_tokens(), online)


def means_by_hand(image, values, counts=None):
    """The mean over predicted tokens of values [rows, length − 1], in loops."""
    total, number = 0.0, 0
    for i, j in np.ndindex(len(values), LENGTH - 1):
        segments = image["segments"][i, j : j + 2]
        if segments[0] == segments[1] != 0 and (counts is None or counts[i, j + 1]):
            total, number = total + values[i, j], number + 1
    return total / number


def test_the_losses_are_means_over_predicted_tokens():
    batch = {"image": IMAGE, "weight": WEIGHT, "teacher": TEACHER(IMAGE)}
    log_p, log_q = (np.asarray(jax.nn.log_softmax(model(IMAGE))) for model in (TEACHER, STUDENT))
    options = {"key": None, "step": jnp.int32(0)}
    hard = -np.take_along_axis(log_q[:, :-1], IMAGE["tokens"][:, 1:, None], -1)[..., 0]
    soft = (np.exp(log_p) * (log_p - log_q)).sum(-1)[:, :-1]
    loss, (_, metrics) = train.next_token()(STUDENT, batch, **options)
    assert loss == pytest.approx(means_by_hand(IMAGE, hard), rel=1e-5)
    wrong = (log_q[:, :-1].argmax(-1) != IMAGE["tokens"][:, 1:]).astype(float)
    assert metrics["error_rate"] == pytest.approx(means_by_hand(IMAGE, wrong), rel=1e-5)
    loss, (_, metrics) = train.distill_tokens(alpha=0.25)(STUDENT, batch, **options)
    expected = [means_by_hand(IMAGE, values) for values in (hard, soft)]
    assert [metrics["hard"], metrics["soft"]] == pytest.approx(expected, rel=1e-4)
    assert loss == pytest.approx(0.25 * expected[0] + 0.75 * expected[1], rel=1e-4)
    counts = np.arange(LENGTH) >= PROMPT + np.zeros((ROWS, 1))
    batch |= {"counts": counts, "weight": train.token_weight(IMAGE, counts)}
    loss, _ = train.distill_tokens()(STUDENT, batch, **options)
    assert loss == pytest.approx(means_by_hand(IMAGE, soft, counts), rel=1e-4)


def test_logits_that_are_never_all_held_give_the_same_step(monkeypatch):
    monkeypatch.setattr(chunks, "_HELD", 3 * V)  # three tokens at a time
    labels = jax.jit(lambda: top_k(TEACHER(IMAGE), 3))()
    data = {"image": IMAGE, "weight": WEIGHT, "teacher": labels}
    for more, make in (
        (1, train.next_token),
        (3, functools.partial(train.distill_tokens, alpha=0.25, soft=bucketed(losses.kl))),
    ):

        def graded(model, chunked, make=make):
            loss, (_, metrics) = make(chunked=chunked)(model, data, key=None, step=jnp.int32(0))
            return loss, metrics

        plain, pieces = (
            jax.jit(jax.value_and_grad(functools.partial(graded, chunked=chunked), has_aux=True))
            for chunked in (False, True)
        )
        held = [f"{ROWS},{LENGTH - 1},{V}]" in str(jax.make_jaxpr(each)(STUDENT)) for each in (plain, pieces)]
        assert held == [True, False]
        # Of each loss: logits, and the gradients of hidden states and kernel. The error rate needs logits alone.
        texts = [str(jax.make_jaxpr(each)(STUDENT)) for each in (plain, pieces)]
        assert texts[1].count("dot_general[") - texts[0].count("dot_general[") == more
        same(pieces(STUDENT), plain(STUDENT), rtol=1e-4, atol=1e-6)


def test_on_policy_without_own_texts_is_word_level():
    same(one_step(train.distill_tokens(), train.on_policy(SAMPLER, prompt=PROMPT, share=0)), word_level())


def test_an_on_policy_step_is_that_made_by_hand():
    soft = functools.partial(losses.jensen_shannon, beta=0.3)
    found, loss = one_step(train.distill_tokens(soft=soft), train.on_policy(SAMPLER, prompt=PROMPT, share=1))
    state = train.init_state(STUDENT, TX, jax.random.key(5))
    image = {name: jnp.asarray(values)[ORDER[0]] for name, values in IMAGE.items()}
    key = jax.random.split(train.step_key(state, 1))[0]
    prompts = {name: values[:, :PROMPT] for name, values in image.items()}
    rows = models.generate(STUDENT, prompts, key=key, length=LENGTH - PROMPT)
    assert (np.asarray(rows["tokens"]) != np.asarray(image["tokens"])).any()
    rows = {name: rows[name] for name in image}
    counts = np.arange(LENGTH) >= PROMPT + np.zeros((len(ORDER[0]), 1))

    @jax.value_and_grad
    def mean(params):
        student, teacher = STUDENT.replace(params=params)(rows), TEACHER(rows)
        values = soft(student, teacher)[:, :-1]
        keep = jnp.asarray(counts)[:, 1:] & (rows["segments"][:, 1:] == rows["segments"][:, :-1])
        keep &= rows["segments"][:, 1:] != 0
        return jnp.sum(jnp.where(keep, values, 0)) / keep.sum()

    value, gradient = mean(STUDENT.params)
    assert loss == pytest.approx(float(value), rel=1e-5)
    same(found, jax.tree.map(lambda p, g: p - 0.1 * g, STUDENT.params, gradient), atol=1e-6)


@pytest.mark.parametrize("share", [0, 1])
def test_rows_without_weight_stay_so(share):
    def sampler(model, prompts, *, key):
        return {
            name: jnp.pad(values, ((0, 0), (0, LENGTH - PROMPT)), "edge") for name, values in prompts.items()
        }

    image = {"tokens": jnp.asarray(IMAGE["tokens"]), "segments": jnp.ones((ROWS, LENGTH), int)}
    batch = {"image": image, "weight": jnp.asarray(WEIGHT).at[1].set(0)}
    found = train.on_policy(sampler, prompt=PROMPT, share=share)(
        TEACHER, batch, jax.random.key(0), model=STUDENT
    )
    assert found["weight"].tolist() == [
        0 if i == 1 else LENGTH - (PROMPT if share else 1) for i in range(ROWS)
    ]


def test_on_policy_mixes_with_the_share():
    """One program draws for each step; any sampler will do, here one that repeats the prompt's last token."""

    def sampler(model, prompts, *, key):
        more = jnp.repeat(prompts[:, -1:], LENGTH - PROMPT, 1)
        return {"tokens": jnp.concatenate([prompts, more], 1)}

    transform = jax.jit(train.on_policy(sampler, prompt=PROMPT, share=0.25))
    tokens = jnp.asarray(IMAGE["tokens"])
    own = 0
    for i in range(80):
        batch = transform(TEACHER, {"image": tokens}, jax.random.key(i), model=STUDENT)
        repeated = bool((batch["image"][:, PROMPT:] == tokens[:, PROMPT - 1 : PROMPT]).all())
        assert batch["weight"].tolist() == [LENGTH - PROMPT if repeated else LENGTH - 1] * ROWS
        own += repeated
    assert 10 <= own <= 32  # of 80 with 0.25: four standard deviations are 15


def test_an_on_policy_step_is_one_program_whatever_the_sampler():
    """Sampler, teacher and update are traced together, and not again for further steps."""
    traced = []

    def sampler(model, prompts, *, key):
        traced.append("sampler")
        drawn = jax.random.randint(key, (len(prompts["tokens"]), LENGTH - PROMPT), 0, V)
        return {
            "tokens": jnp.concatenate([prompts["tokens"], drawn], 1),
            "segments": jnp.ones((4, LENGTH), int),
        }

    def score(teacher, batch):
        traced.append("teacher")
        return teachers.label(teacher, batch)

    def loss_fn(model, batch, **options):
        traced.append("update")
        return train.distill_tokens()(model, batch, **options)

    transform = train.on_policy(sampler, prompt=PROMPT, score=score)
    epoch = train.make_epoch(train.make_train_step(loss_fn, TX), transform=transform)
    state = train.init_state(STUDENT, TX, jax.random.key(5))
    data = jax.tree.map(jnp.asarray, {"image": IMAGE, "weight": WEIGHT})
    state, _ = epoch(state, data, np.repeat(ORDER, 9, 0), TEACHER)
    first = traced.copy()
    assert set(first) == {"sampler", "teacher", "update"}
    assert len(first) < 9  # not once for each of the nine steps
    _, metrics = epoch(state, data, np.repeat(ORDER[:, ::-1], 9, 0), TEACHER)
    assert traced == first
    assert np.isfinite(metrics["loss"]).all()


def test_stored_labels_of_tokens_are_those_online(tmp_path):
    ids = RNG.permutation(100)[:ROWS]
    kind = kinds.Top(3)

    def outputs(rows):
        return models.predict(TEACHER, {n: x[rows] for n, x in IMAGE.items()}, batch_size=4)

    options = {"length": LENGTH, "fingerprint": {"teacher": "t"}, "kind": kind}
    store = teachers.write_token_labels(tmp_path / "a", ids, outputs, shard_rows=4, **options)
    assert (store.count, store.bytes_per_label) == (ROWS * LENGTH, 3 + 4 * 4)
    stored = store[teachers.token_ids(ids, LENGTH)]
    fresh = jax.jit(lambda logits: top_k(logits, 3))(outputs(np.arange(ROWS)))
    same(stored, fresh)
    loss_fn = train.distill_tokens(soft=bucketed(losses.kl))
    data = {"image": IMAGE, "weight": WEIGHT}
    same(*(one_step(loss_fn, data=data | {"teacher": labels}) for labels in (stored, fresh)))

    # Hidden states with the head, and draws
    def hidden(rows):
        inputs = {n: x[rows] for n, x in IMAGE.items()}
        return models.predict(models.hidden_states(TEACHER), inputs, batch_size=4)

    other = {"length": LENGTH, "fingerprint": {"teacher": "t"}, "shard_rows": 4}
    head = kinds.Hidden(models.head_kernel(TEACHER))
    store_h = teachers.write_token_labels(tmp_path / "h", ids, hidden, kind=head, **other)
    found = store_h[teachers.token_ids(ids, LENGTH)]
    np.testing.assert_allclose(found, outputs(np.arange(ROWS)), rtol=1e-5, atol=1e-5)
    drawn = teachers.write_token_labels(tmp_path / "s", ids, outputs, kind=kinds.Sampled(5), **other)
    assert (store_h.bytes_per_label, drawn.bytes_per_label) == (8 * 4, 5 * 2)
    # One label per token, of which any can be read alone
    one = store[ids[2] * LENGTH + 5]
    same(one, jax.tree.map(lambda x: x[2, 5], stored))
    with pytest.raises(ValueError, match=r"outputs must be \[4, 8, ...\], one entry per token"):
        teachers.write_token_labels(tmp_path / "b", ids, lambda r: outputs(r)[:, 1:], shard_rows=4, **options)


def test_a_teachers_texts_are_the_same_after_a_stop(tmp_path):
    sampler = functools.partial(models.generate, TEACHER, length=LENGTH - PROMPT)
    prompts = {name: values[:, :PROMPT] for name, values in IMAGE.items()}
    options = {"vocabulary": V, "batch_size": 3, "fingerprint": {"teacher": "t"}, "seed": 4}

    class StoppedError(Exception):
        pass

    made, stop = [], 3

    def counted(given, *, key, length):
        made.append(1)
        if len(made) == stop:  # in the middle of a batch
            raise StoppedError
        return sampler(given, key=key)

    counted = functools.partial(counted, **sampler.keywords)
    calm = teachers.write_samples(tmp_path / "calm", prompts, sampler, **options)
    with pytest.raises(StoppedError):
        teachers.write_samples(tmp_path / "killed", prompts, counted, **options)
    made, stop = [], None
    again = teachers.write_samples(tmp_path / "killed", prompts, counted, **options)
    assert len(made) == -(-ROWS // 3) - 2  # the first two batches are not made again
    texts = calm[np.arange(ROWS)]
    same(again[np.arange(ROWS)], texts)
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("calm", "killed")]
    assert files[0] == files[1]
    assert texts["tokens"].shape == (ROWS, LENGTH)
    np.testing.assert_array_equal(texts["tokens"][:, :PROMPT], prompts["tokens"])
    assert len({tuple(row) for row in texts["tokens"][:, PROMPT:].tolist()}) > ROWS // 2
    for wrong, message in (
        (
            lambda prompts, *, key: prompts["tokens"],
            "must return a dict with 'tokens' and 'segments', got ndarray",
        ),
        (lambda prompts, *, key: {"tokens": 1}, r"'segments', got dict with \['tokens'\]"),
        (
            lambda prompts, *, key: {name: np.repeat(x, 2, 0) for name, x in prompts.items()},
            "one text for each of 3 prompts, got 6",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            teachers.write_samples(tmp_path / "wrong", prompts, wrong, **options)
    with pytest.raises(ValueError, match="seed"):
        teachers.write_samples(tmp_path / "calm", prompts, sampler, **options | {"seed": 5})
    for cold in (0.1, np.float32(0.1), jnp.float32(0.1)):
        colder = functools.partial(sampler, temperature=cold)
        with pytest.raises(ValueError, match="sampler"):
            teachers.write_samples(tmp_path / "calm", prompts, colder, **options)
    # They are the rows of the next training
    batch = {"image": texts, "weight": train.token_weight(texts)}
    assert np.isfinite(train.next_token()(STUDENT, batch, key=None, step=jnp.int32(0))[0])


def test_the_guide_to_a_teachers_texts_takes_rows_whose_last_is_short(tmp_path, monkeypatch):
    guide = (Path(__file__).parents[1] / "docs" / "guides" / "text.md").read_text(encoding="utf-8")
    program = guide.split("**Sequence-level.**")[1].split("```python\n")[1].split("```")[0]
    rows = text.pack([text.to_tokens(b"x" * 140)], 129)
    assert (rows["segments"] != 0).sum(1).tolist() == [129, 13]
    config = models.TransformerConfig(vocabulary=256, width=2, layers=1, heads=1, hidden=2)
    teacher = models.build_transformer(config, jax.random.key(0))
    monkeypatch.chdir(tmp_path)
    names = {"rows": rows, "teacher": teacher, "functools": functools, "np": np}
    names |= {"models": models, "teachers": teachers, "train": train}
    exec(program, names)
    assert names["examples"]["weight"].tolist() == [97]


def test_exposure_is_none_for_the_teacher_itself_and_some_for_a_student():
    measure = jax.jit(
        lambda student: train.exposure(student, TEACHER, IMAGE, SAMPLER, prompt=PROMPT, key=jax.random.key(0))
    )
    own, other = measure(TEACHER), measure(STUDENT)
    assert own["on_data"] == pytest.approx(0, abs=1e-6)
    assert own["on_own"] == pytest.approx(0, abs=1e-6)
    # Of texts that are packed behind the prompt's own nothing counts, nor what is written in their places
    segments = IMAGE["segments"]
    counts = (np.arange(LENGTH) >= PROMPT) & (segments == segments[:, PROMPT - 1 : PROMPT])
    assert (segments != 0)[:, PROMPT:].sum() > counts.sum() > 0
    prompts = {name: values[:, :PROMPT] for name, values in IMAGE.items()}
    written = jax.jit(SAMPLER)(STUDENT, prompts, key=jax.random.split(jax.random.key(0))[0])
    for name, image in (("on_data", IMAGE), ("on_own", written)):
        soft = np.asarray(losses.kl(STUDENT(image), TEACHER(image)))[:, :-1]
        assert other[name] == pytest.approx(means_by_hand(image, soft, counts), rel=1e-4)
    log_p = np.asarray(jax.nn.log_softmax(TEACHER(written)))[:, :-1]
    surprise = -np.take_along_axis(log_p, np.asarray(written["tokens"])[:, 1:, None], -1)[..., 0]
    assert other["own_loss"] == pytest.approx(means_by_hand(written, surprise, counts), rel=1e-4)
    assert other["own_loss"] > own["own_loss"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train.on_policy(SAMPLER, prompt=0), "prompt must be"),
        (lambda: train.on_policy(SAMPLER, prompt=2, share=1.5), "share must lie in"),
        (lambda: train.on_policy(3, prompt=2), "sampler must be a function"),
        (lambda: train.distill_tokens(temperature=0), "temperature must be positive"),
        (lambda: train.predicted(np.zeros(3, int)), r"tokens must have shape \[batch, length\]"),
        (lambda: train.predicted({"segments": 1}), "a dict with 'tokens'"),
        (
            lambda: train.predicted({"tokens": np.zeros((2, 3)), "segments": np.ones((2, 2))}),
            "segments must be",
        ),
        (
            lambda: one_step(train.distill_tokens(), train.on_policy(SAMPLER, prompt=2)),
            "rows must have the shape",
        ),
        (
            lambda: train.on_policy(
                lambda model, prompts, *, key: {"tokens": IMAGE["tokens"]}, prompt=2, share=1
            )(TEACHER, {"image": IMAGE}, jax.random.key(0), model=STUDENT),
            r"must have all entries of the data's, \['segments', 'tokens'\]: \['segments'\] are missing",
        ),
        *(
            (
                lambda made=made: train.on_policy(lambda model, prompts, *, key: made, prompt=2, share=1)(
                    TEACHER, {"image": IMAGE}, jax.random.key(0), model=STUDENT
                ),
                message,
            )
            for made, message in (
                (IMAGE["tokens"], "the sampler must return a dict with 'tokens', got ndarray"),
                ({"text": 1}, r"a dict with 'tokens', got dict with \['text'\]"),
                (IMAGE | {"tokens": IMAGE["tokens"] * 1.0}, "the sampler's tokens must be integers"),
            )
        ),
        (
            lambda: one_step(train.distill_tokens(), train.on_policy(SAMPLER, prompt=8)),
            "prompt must be below",
        ),
        (
            lambda: kinds.Tokens(4).encode({"tokens": [[4]], "segments": [[1]]}),
            r"tokens must lie in \[0, 3\]",
        ),
        (lambda: kinds.Tokens(4).encode([[4]]), "dict of tokens and segments"),
        (lambda: teachers.token_ids([1], 0), "length"),
        (lambda: teachers.token_ids([2**62], 16), "must fit into 64 bits"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_the_text_teaches_what_top_k_labels_leave_open():
    """Averaged over texts as the teacher writes them, the gradient is that of KL over all tokens; in chunks, too."""
    rng = np.random.default_rng(0)
    config = models.TransformerConfig(vocabulary=6, width=8, layers=1, heads=2, hidden=8)
    model = models.build_transformer(config, jax.random.key(0))
    logits = jnp.asarray(rng.normal(size=(1, 2, 6)), jnp.float32)
    top = losses.tokens.top_k(logits, 2)
    whole, options = (
        train.distill_tokens(),
        {"soft": losses.tokens.bucketed(losses.kl), "other_from_text": True},
    )

    def gradient(loss_fn, token, teacher):
        batch = {"image": jnp.array([[3, token]]), "teacher": {"logits": teacher}}
        # The input is the first token, so the second one changes nothing but the label
        return jax.grad(lambda m: loss_fn(m, batch, key=None, step=0)[0], allow_int=True)(model).params

    p = jax.nn.softmax(logits[0, 0])
    for chunked in (False, True):
        loss_fn = train.distill_tokens(**options, chunked=chunked)
        each = [gradient(loss_fn, token, top) for token in range(6)]
        mean = jax.tree.map(lambda *g: sum(w * x for w, x in zip(p, g, strict=True)), *each)
        expected = gradient(whole, 0, logits)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), mean, expected)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(*map(jax.tree.leaves, each[:2]), strict=True))
    with pytest.raises(ValueError, match="other_from_text needs temperature 1"):
        train.distill_tokens(**options, temperature=2.0)
    with pytest.raises(ValueError, match="other_from_text needs top-k labels"):
        gradient(train.distill_tokens(other_from_text=True), 0, logits)
