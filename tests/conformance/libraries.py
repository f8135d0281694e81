"""One adapter per library: how a user of that library calls the loss of a case, by the library's documentation.

An adapter names its losses in ``routes``, a dict from the loss of a case to functions ``(student, **inputs)``. A case
is right if *one* of them gives the right value and gradient. A function raises :class:`NotOfferedError` where the
library documents no such option. Factors that are a matter of convention, such as T², are written here.
"""

import functools
import importlib.metadata
import os
import warnings

import numpy as np

FLOATS = ("student", "teacher")  # arrays in the float type of the case
STATIC = ("k", "ddof", "reduce", "ignored", "mean_of_squares")  # options that are no arrays


class NotOfferedError(Exception):
    """The library documents no such loss or option."""


def refuse(**options):
    """Raises :class:`NotOfferedError` if an option that the library does not have is asked for."""
    for name, value in options.items():
        if value is not None:
            raise NotOfferedError(name)


class Library:
    """What adapters share. The docstring of each says, for the page of results, how the library is called."""

    packages: tuple[str, ...] = ()
    title = ""

    def versions(self):
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in self.packages)

    def results(self, loss, dtype, case):
        """Yields (value, gradient) of each route, or the error that it raised."""
        for route in self.routes.get(loss, ()):
            try:
                yield self.evaluate(route, dtype, case)
            except NotOfferedError:
                continue
            except (ValueError, TypeError, RuntimeError, IndexError) as error:
                yield error

    def prepare(self, case):
        """Lists become arrays; a single row of logits becomes a batch of one."""
        inputs = {}
        for name, value in case.items():
            if name in ("value", "gradient"):
                continue
            if np.ndim(case["student"]) == 1 and name in (*FLOATS, "labels", "where"):
                value = [value]
            if isinstance(value, list):
                soft = name == "labels" and isinstance(value[0], list) and np.ndim(case["student"]) == 1
                value = np.array(value, float if name in FLOATS or soft else None)
            inputs[name] = value
        return inputs


# --- JAX -------------------------------------------------------------------------------------


class JaxLibrary(Library):
    traced = True  # whether options such as a temperature are traced

    def evaluate(self, route, dtype, case):
        import jax
        import jax.numpy as jnp

        inputs = self.prepare(case)
        with jax.enable_x64(dtype == "float64"):
            arrays = {
                n: jnp.asarray(v, dtype if n in FLOATS else None) for n, v in inputs.items() if np.ndim(v)
            }
            static = {n: v for n, v in inputs.items() if not np.ndim(v)}
            if self.traced:
                arrays |= {n: static.pop(n) for n in list(static) if n not in STATIC}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step = compiled(route, tuple(sorted(static.items())))
                value, gradient = step(arrays.pop("student"), arrays)
            return float(value), np.asarray(gradient, float).reshape(np.shape(case["student"]))


@functools.cache
def compiled(route, static):
    import jax
    import jax.numpy as jnp

    def scalar(student, arrays):
        return jnp.sum(route(student, **arrays, **dict(static)))

    return jax.jit(jax.value_and_grad(scalar))


class Ours(JaxLibrary):
    """`distill_jax.losses`, under `jax.jit`."""

    title = "distill_jax"
    packages = ("distill_jax", "jax")

    @functools.cached_property
    def routes(self):
        import jax.numpy as jnp

        from distill_jax import losses
        from distill_jax.losses import tokens

        def kl_rows(student, teacher, temperature):
            temperature = jnp.asarray(temperature)
            return jnp.mean(
                losses.kl(
                    student, teacher, temperature=temperature[:, None] if temperature.ndim else temperature
                )
            )

        def reduced(loss, student, other, reduce, **options):
            if reduce == "tokens":  # all tokens as one sequence
                one = [x.reshape(1, -1, *x.shape[2:]) for x in (student, other)]
                options = {
                    n: x.reshape(1, -1) if n in ("tokens", "weights") else x for n, x in options.items()
                }
                return tokens.sequence(loss)(*one, **options)
            if reduce == "sum":
                return tokens.sequence(loss, reduce="sum")(student, other, **options)
            return jnp.mean(tokens.sequence(loss)(student, other, **options))

        def cross_entropy_of_tokens(student, labels, ignored, reduce):
            return reduced(losses.cross_entropy, student, labels, reduce, tokens=labels != ignored)

        def top_k_kl(student, teacher, k, temperature=1.0):
            labels = tokens.top_k(teacher, k, temperature=temperature)
            return tokens.bucketed(losses.kl)(student, labels, temperature=temperature)

        def standardised_kl(student, teacher, ddof, temperature):
            s, t = (losses.standardise(x, ddof=ddof) for x in (student, teacher))
            return losses.kl(s, t, temperature=temperature)

        def kd_and_labels(student, teacher, labels, alpha, temperature):
            soft = losses.kl(student, teacher, temperature=temperature)
            return jnp.mean(alpha * losses.cross_entropy(student, labels) + (1 - alpha) * soft)

        def mean(loss, **fixed):
            return lambda student, teacher, **options: jnp.mean(loss(student, teacher, **fixed, **options))

        def attention_transfer(student, teacher, mean_of_squares):
            return jnp.mean(losses.attention_transfer(student, teacher, mean=mean_of_squares))

        def named(loss):  # a case's inputs are keywords
            return lambda student, teacher, **options: loss(student, teacher, **options)

        pairs = (
            "kl reverse_kl jensen_shannon skew_kl skew_reverse_kl total_variation soft_cross_entropy "
            "mean_squared_logits dkd"
        )
        return {
            **{name: [named(getattr(losses, name))] for name in pairs.split()},
            "cross_entropy": [losses.cross_entropy],
            "cross_entropy_smoothed_over_existing": [losses.cross_entropy],
            "logit_adjusted": [losses.logit_adjusted],
            "kl_rows": [kl_rows],
            "kl_of_tokens": [
                lambda student, teacher, **options: reduced(losses.kl, student, teacher, **options)
            ],
            "cross_entropy_of_tokens": [cross_entropy_of_tokens],
            "top_k_kl": [top_k_kl],
            "standardised_kl": [standardised_kl],
            "kd_and_labels": [kd_and_labels],
            "dist": [mean(losses.dist)],
            "hint": [mean(losses.hint)],
            "attention_transfer": [attention_transfer],
            "factor_transfer": [mean(losses.factor_transfer, mean=True)],
            "similarity_preserving": [mean(losses.similarity_preserving)],
            "rkd_distance": [mean(losses.rkd_distance, include_self=True)],
            "rkd_angle": [mean(losses.rkd_angle, include_self=True)],
            "pkt": [mean(losses.pkt, include_self=True)],
            "activation_boundary": [mean(losses.activation_boundary)],
            "vid": [mean(losses.vid, mean=True)],
            "hierarchical_context": [mean(losses.hierarchical_context)],
        }


class Optax(JaxLibrary):
    """`kl_divergence`, `kl_divergence_with_log_targets`, `softmax_cross_entropy`,
    `safe_softmax_cross_entropy`, `softmax_cross_entropy_with_integer_labels`, `smooth_labels` and
    `squared_error`, under `jax.jit`. Their inputs come from `jax.nn.log_softmax` and `softmax` of
    logits / T, with `where` if the case has one; results times T². (`kl_divergence` asks for targets
    above 0, `kl_divergence_with_log_targets` does not.)
    """

    title = "Optax"
    packages = ("optax", "jax")

    @functools.cached_property
    def routes(self):
        import jax
        import jax.numpy as jnp
        import optax

        def logs(logits, temperature, where=None):
            return jax.nn.log_softmax(logits / temperature, where=where)

        def kl(student, teacher, temperature=1.0, where=None):
            p = jax.nn.softmax(teacher / temperature, where=where)
            return temperature**2 * optax.losses.kl_divergence(
                logs(student, temperature, where), p, where=where
            )

        def kl_log(student, teacher, temperature=1.0, where=None):
            q, p = logs(student, temperature, where), logs(teacher, temperature, where)
            return temperature**2 * optax.losses.kl_divergence_with_log_targets(q, p, where=where)

        def swapped(loss):
            return lambda student, teacher, **options: loss(teacher, student, **options)

        def by_row(loss):
            def rows(student, teacher, temperature):
                temperature = jnp.asarray(temperature)
                values = jax.vmap(loss, (0, 0, 0 if temperature.ndim else None))(
                    student, teacher, temperature
                )
                return jnp.mean(values)

            return rows

        def of_tokens(loss):
            def values(student, teacher, temperature, reduce, tokens=None, weights=None):
                refuse(weights=weights)
                return average(
                    loss(student, teacher, temperature, where=tokens[..., None]), 1.0 * tokens, reduce
                )

            return values

        def average(values, weights, reduce):
            total, weight = jnp.sum(values * weights, -1), jnp.sum(weights, -1)
            if reduce == "sum":
                return jnp.sum(total)
            if reduce == "tokens":
                total, weight = jnp.sum(total), jnp.sum(weight)
            return jnp.mean(total / jnp.where(weight > 0, weight, 1.0))

        def soft_cross_entropy(student, teacher, temperature=1.0, where=None):
            p = jax.nn.softmax(teacher / temperature, where=where)
            return temperature**2 * optax.softmax_cross_entropy(student / temperature, p, where=where)

        def safe_soft_cross_entropy(student, teacher, temperature=1.0, where=None):
            refuse(where=where)
            p = jax.nn.softmax(teacher / temperature)
            return temperature**2 * optax.safe_softmax_cross_entropy(student / temperature, p)

        def distribution(student, labels, label_smoothing):
            if jnp.issubdtype(labels.dtype, jnp.integer):
                labels = jax.nn.one_hot(labels, student.shape[-1])
            return labels if label_smoothing is None else optax.smooth_labels(labels, label_smoothing)

        def cross_entropy(student, labels, label_smoothing=None, where=None):
            if label_smoothing is not None:
                refuse(where=where)  # smooth_labels has no `where`
            return optax.softmax_cross_entropy(
                student, distribution(student, labels, label_smoothing), where=where
            )

        def safe_cross_entropy(student, labels, label_smoothing=None, where=None):
            refuse(where=where)
            return optax.safe_softmax_cross_entropy(student, distribution(student, labels, label_smoothing))

        def integer_cross_entropy(student, labels, label_smoothing=None, where=None):
            refuse(label_smoothing=label_smoothing)
            if not jnp.issubdtype(labels.dtype, jnp.integer):
                raise NotOfferedError
            return optax.softmax_cross_entropy_with_integer_labels(student, labels, where=where)

        def cross_entropy_of_tokens(student, labels, ignored, reduce):
            counts = labels != ignored  # labels must lie in [0, classes)
            labels = jnp.where(counts, labels, 0)
            values = optax.softmax_cross_entropy_with_integer_labels(student, labels, where=counts)
            return average(values, 1.0 * counts, reduce)

        def kd_and_labels(student, teacher, labels, alpha, temperature):
            hard = optax.softmax_cross_entropy_with_integer_labels(student, labels)
            return jnp.mean(alpha * hard + (1 - alpha) * kl(student, teacher, temperature))

        def mean_square(student, teacher):
            return jnp.mean(optax.squared_error(student, teacher))

        return {
            "kl": [kl, kl_log],
            "reverse_kl": [swapped(kl), swapped(kl_log)],
            "kl_rows": [by_row(kl), by_row(kl_log)],
            "soft_cross_entropy": [soft_cross_entropy, safe_soft_cross_entropy],
            "cross_entropy": [integer_cross_entropy, cross_entropy, safe_cross_entropy],
            "kl_of_tokens": [of_tokens(kl), of_tokens(kl_log)],
            "cross_entropy_of_tokens": [cross_entropy_of_tokens],
            "kd_and_labels": [kd_and_labels],
            "mean_squared_logits": [mean_square],
            "hint": [mean_square],
        }


class Keras(JaxLibrary):
    packages = ("keras", "jax")
    traced = False  # its temperature must be a Python number

    @functools.cached_property
    def keras(self):
        os.environ["KERAS_BACKEND"] = "jax"
        import keras

        return keras


class KerasDistillation(Keras):
    """`LogitsDistillation(temperature=T).compute_loss` with its default loss, and
    `FeatureDistillation().compute_loss`, on the JAX backend.

    All its faults have one cause: the default loss, the string `"kl_divergence"`, compares clipped
    logits as if they were probabilities (see below). So what the groups of cases mean says little here.
    """

    title = "keras.distillation"

    def logits(self, temperature):
        return self.keras.distillation.LogitsDistillation(temperature=temperature)

    @functools.cached_property
    def routes(self):
        def kl(student, teacher, temperature=1.0, where=None):
            refuse(where=where)
            if student.dtype == "float64":  # computed in keras.config.floatx(), which is for a whole program
                raise NotOfferedError
            return self.logits(temperature).compute_loss(teacher, student)

        def kl_rows(student, teacher, temperature):
            if np.ndim(temperature):
                raise NotOfferedError
            return kl(student, teacher, temperature)

        def hint(student, teacher):
            return self.keras.distillation.FeatureDistillation().compute_loss(teacher, student)

        return {"kl": [kl], "kl_rows": [kl_rows], "hint": [hint]}


class KerasDistillationOfInstance(KerasDistillation):
    """`LogitsDistillation(temperature=T, loss=keras.losses.KLDivergence())` and `FeatureDistillation()`."""

    title = "keras.distillation, loss=KLDivergence()"

    def logits(self, temperature):
        loss = self.keras.losses.KLDivergence()
        return self.keras.distillation.LogitsDistillation(temperature=temperature, loss=loss)


class KerasLosses(Keras):
    """`KLDivergence`, `CategoricalCrossentropy` and `SparseCategoricalCrossentropy` with
    `from_logits=True`, and `MeanSquaredError`, on the JAX backend. Probabilities come from
    `keras.ops.softmax` of logits / T; results times T².
    """

    title = "keras.losses"

    @functools.cached_property
    def routes(self):
        losses, softmax = self.keras.losses, self.keras.ops.softmax

        def dtype_of(x):  # by default Keras converts to float32
            return "float64" if x.dtype == "float64" else None

        def kl(student, teacher, temperature=1.0, where=None):
            refuse(where=where)
            loss = losses.KLDivergence(dtype=dtype_of(student))
            return temperature**2 * loss(softmax(teacher / temperature), softmax(student / temperature))

        def kl_rows(student, teacher, temperature):
            temperature = np.reshape(temperature, (-1, 1)).astype(np.float32)
            loss = losses.KLDivergence(reduction=None)
            values = loss(softmax(teacher / temperature), softmax(student / temperature))
            return (temperature[:, 0] ** 2 * values).mean()

        def kl_of_tokens(student, teacher, temperature, reduce, tokens=None, weights=None):
            reductions = {"tokens": "mean_with_sample_weight", "sum": "sum"}
            if reduce not in reductions:
                raise NotOfferedError
            loss = losses.KLDivergence(reduction=reductions[reduce])
            weights = 1.0 * tokens if weights is None else weights
            p, q = softmax(teacher / temperature), softmax(student / temperature)
            return temperature**2 * loss(p, q, sample_weight=weights)

        def soft_cross_entropy(student, teacher, temperature=1.0, where=None):
            refuse(where=where)
            loss = losses.CategoricalCrossentropy(from_logits=True)
            return temperature**2 * loss(softmax(teacher / temperature), student / temperature)

        def cross_entropy(student, labels, label_smoothing=0.0, where=None):
            refuse(where=where)
            if labels.ndim == 1:
                labels = self.keras.ops.one_hot(labels, student.shape[-1])
            loss = losses.CategoricalCrossentropy(
                from_logits=True, label_smoothing=label_smoothing, dtype=dtype_of(student)
            )
            return loss(labels, student)

        def sparse_cross_entropy(student, labels, label_smoothing=None, where=None):
            refuse(where=where, label_smoothing=label_smoothing)
            if labels.ndim > 1:
                raise NotOfferedError
            return losses.SparseCategoricalCrossentropy(from_logits=True, dtype=dtype_of(student))(
                labels, student
            )

        def cross_entropy_of_tokens(student, labels, ignored, reduce):
            reduction = {"tokens": "mean_with_sample_weight", "sum": "sum"}[reduce]
            loss = losses.SparseCategoricalCrossentropy(
                from_logits=True, ignore_class=ignored, reduction=reduction
            )
            return loss(labels, student, sample_weight=self.keras.ops.ones(labels.shape))

        def plain_cross_entropy_of_tokens(student, labels, ignored, reduce):
            reduction = {"tokens": "sum_over_batch_size", "sum": "sum"}[reduce]
            loss = losses.SparseCategoricalCrossentropy(
                from_logits=True, ignore_class=ignored, reduction=reduction
            )
            return loss(labels, student)

        def kd_and_labels(student, teacher, labels, alpha, temperature):
            hard = losses.SparseCategoricalCrossentropy(from_logits=True)(labels, student)
            return alpha * hard + (1 - alpha) * kl(student, teacher, temperature)

        def mean_square(student, teacher):
            return losses.MeanSquaredError()(teacher, student)

        return {
            "kl": [kl],
            "reverse_kl": [lambda student, teacher, **options: kl(teacher, student, **options)],
            "kl_rows": [kl_rows],
            "kl_of_tokens": [kl_of_tokens],
            "soft_cross_entropy": [soft_cross_entropy],
            "cross_entropy": [cross_entropy, sparse_cross_entropy],
            "cross_entropy_of_tokens": [cross_entropy_of_tokens, plain_cross_entropy_of_tokens],
            "kd_and_labels": [kd_and_labels],
            "mean_squared_logits": [mean_square],
            "hint": [mean_square],
        }


# --- PyTorch ---------------------------------------------------------------------------------


class TorchLibrary(Library):
    def evaluate(self, route, dtype, case):
        import torch

        arrays = {}
        for name, value in self.prepare(case).items():
            arrays[name] = value
            if np.ndim(value):
                arrays[name] = torch.tensor(value, dtype=getattr(torch, dtype) if name in FLOATS else None)
                if arrays[name].dtype == torch.float64 and dtype != "float64":
                    arrays[name] = arrays[name].float()
        student = arrays.pop("student").requires_grad_()
        value = route(student, **arrays).sum()
        value.backward()
        gradient = np.zeros(student.shape) if student.grad is None else student.grad.double().numpy()
        return value.item(), gradient.reshape(np.shape(case["student"]))


class Torch(TorchLibrary):
    """`F.kl_div` of `log_softmax(student / T)`, with probabilities and with `log_target=True`, times T²;
    `F.cross_entropy` and `F.mse_loss`.
    """

    title = "PyTorch"
    packages = ("torch",)

    @functools.cached_property
    def routes(self):
        import torch
        import torch.nn.functional as f

        def kl(student, teacher, temperature=1.0, where=None, log_target=False):
            refuse(where=where)
            p = (f.log_softmax if log_target else f.softmax)(teacher / temperature, -1)
            terms = f.kl_div(
                f.log_softmax(student / temperature, -1), p, reduction="none", log_target=log_target
            )
            return temperature**2 * terms.sum(-1, keepdim=True)

        kl_log = functools.partial(kl, log_target=True)

        def by_row(loss):
            def rows(student, teacher, temperature):
                temperature = torch.as_tensor(temperature).reshape(-1, 1).float()
                return loss(student, teacher, temperature).mean()

            return rows

        def swapped(loss):
            return lambda student, teacher, **options: loss(teacher, student, **options)

        def soft_cross_entropy(student, teacher, temperature=1.0, where=None):
            refuse(where=where)
            return temperature**2 * f.cross_entropy(
                student / temperature, f.softmax(teacher / temperature, -1)
            )

        def cross_entropy(student, labels, label_smoothing=0.0, where=None):
            refuse(where=where)
            return f.cross_entropy(student, labels, label_smoothing=label_smoothing)

        def cross_entropy_of_tokens(student, labels, ignored, reduce):
            if reduce == "tokens" and (labels == ignored).all():
                raise NotOfferedError  # the documented mean is 0/0
            reduction = {"tokens": "mean", "sum": "sum"}[reduce]
            return f.cross_entropy(
                student.flatten(0, 1), labels.flatten(), ignore_index=ignored, reduction=reduction
            )

        def mean_square(student, teacher):
            return f.mse_loss(student, teacher)

        def kd_and_labels(student, teacher, labels, alpha, temperature):
            return (
                alpha * f.cross_entropy(student, labels)
                + (1 - alpha) * kl(student, teacher, temperature).mean()
            )

        return {
            "kl": [kl, kl_log],
            "reverse_kl": [swapped(kl), swapped(kl_log)],
            "kl_rows": [by_row(kl), by_row(kl_log)],
            "soft_cross_entropy": [soft_cross_entropy],
            "cross_entropy": [cross_entropy],
            "cross_entropy_of_tokens": [cross_entropy_of_tokens],
            "kd_and_labels": [kd_and_labels],
            "mean_squared_logits": [mean_square],
            "hint": [mean_square],
        }


class Trl(TorchLibrary):
    """`GKDTrainer.generalized_jsd_loss`, whose β = 0 is KL and β = 1 reverse KL, as its documentation
    says. For top-k labels `IWOPDTrainer.generalized_jsd_loss(top_k=k, add_tail=True, beta=0)`. Results
    times T².
    """

    title = "TRL"
    packages = ("trl", "torch")

    @functools.cached_property
    def routes(self):
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        import torch
        from trl.experimental.gkd import GKDTrainer
        from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

        divergence = GKDTrainer.generalized_jsd_loss

        def jsd(student, teacher, beta=0.5, temperature=1.0, where=None, ends=False):
            refuse(where=where)
            if beta in (0, 1) and not ends:
                raise NotOfferedError
            rows = (x[:, None] for x in (student, teacher))  # [batch, 1 token, vocabulary]
            return temperature**2 * divergence(*rows, beta=beta, temperature=temperature)

        def kl_rows(student, teacher, temperature):
            if np.ndim(temperature):
                raise NotOfferedError
            return jsd(student, teacher, 0, temperature, ends=True)

        def kl_of_tokens(student, teacher, temperature, reduce, tokens=None, weights=None):
            refuse(weights=weights)
            reductions = {"tokens": "batchmean", "sum": "sum"}
            if reduce not in reductions:
                raise NotOfferedError
            labels = torch.where(tokens, 0, -100)
            options = {"temperature": temperature, "reduction": reductions[reduce]}
            return temperature**2 * divergence(student, teacher, labels=labels, beta=0, **options)

        def top_k_kl(student, teacher, k, temperature=1.0):
            options = {"beta": 0, "top_k": k, "add_tail": True, "temperature": temperature}
            rows = (x[:, None] for x in (student, teacher))
            return temperature**2 * IWOPDTrainer.generalized_jsd_loss(*rows, **options)

        return {
            "kl": [functools.partial(jsd, beta=0, ends=True)],
            "reverse_kl": [functools.partial(jsd, beta=1, ends=True)],
            "jensen_shannon": [jsd],
            "kl_rows": [kl_rows],
            "kl_of_tokens": [kl_of_tokens],
            "top_k_kl": [top_k_kl],
        }


class Torchdistill(TorchLibrary):
    """The modules of `torchdistill.losses.mid_level`. `KDLoss` and `LogitStdKDLoss` return KL without T²
    where α is 0: that is multiplied by T² for the cases of KL alone, and taken as it is where the case
    is α·cross-entropy + (1 − α)·T²·KL, the documented formula. `PKTLoss` is the mean over the entries
    of a matrix, and is multiplied by the batch.
    """

    title = "torchdistill"
    packages = ("torchdistill", "torch")

    @functools.cached_property
    def routes(self):
        from torchdistill.losses import mid_level

        where_is = ("out", "output", "out", "output")

        def io(x):
            return {"out": {"output": x}}

        def channels_first(x):
            return x.movedim(-1, 1)

        side = {"path": "out", "io": "output"}
        pair = {"one": {"student": side, "teacher": side, "weight": 1}}
        first = {"student_output_path": "out", "teacher_output_path": "out"}

        def kl(student, teacher, temperature=1.0, where=None):
            refuse(where=where)
            return temperature**2 * mid_level.KDLoss(*where_is, temperature, alpha=0)(
                io(student), io(teacher)
            )

        def kl_rows(student, teacher, temperature):
            if np.ndim(temperature):
                raise NotOfferedError
            return kl(student, teacher, temperature)

        def kd_and_labels(student, teacher, labels, alpha, temperature):
            return mid_level.KDLoss(*where_is, temperature, alpha=alpha)(io(student), io(teacher), labels)

        def standardised_kl(student, teacher, ddof, temperature):
            if ddof != 1:
                raise NotOfferedError
            loss = mid_level.LogitStdKDLoss(*where_is, temperature, alpha=0)
            return temperature**2 * loss(io(student), io(teacher))

        def dist(student, teacher):
            return mid_level.DISTLoss(*where_is)(io(student), io(teacher))

        def attention_transfer(student, teacher, mean_of_squares):
            loss = mid_level.ATLoss(pair, mode="code" if mean_of_squares else "paper")
            return loss(io(channels_first(student)), io(channels_first(teacher)))

        def factor_transfer(student, teacher):
            loss = mid_level.FTLoss(p=1, paraphraser_path="out", translator_path="out")
            return loss(io(student), io(teacher))

        def similarity_preserving(student, teacher):
            return mid_level.SPKDLoss(**first, reduction="batchmean")(io(student), io(teacher))

        def rkd(distance, angle):
            loss = mid_level.RKDLoss("out", "out", distance, angle, "mean")
            return lambda student, teacher: loss(io(student), io(teacher))

        def pkt(student, teacher):
            return len(student) * mid_level.PKTLoss(*where_is)(io(student), io(teacher))

        def activation_boundary(student, teacher, margin):
            return mid_level.AltActTransferLoss(pair, margin, "mean")(io(student), io(teacher))

        def vid(student, teacher, variance):
            predicted = (student, student.new_full(student.shape, variance))
            return mid_level.VIDLoss(pair)(io(predicted), io(teacher))

        def hierarchical_context(student, teacher):
            loss = mid_level.HierarchicalContextLoss(*where_is)
            return loss(io((channels_first(student), None)), io(channels_first(teacher)))

        return {
            "kl": [kl],
            "kl_rows": [kl_rows],
            "kd_and_labels": [kd_and_labels],
            "standardised_kl": [standardised_kl],
            "dist": [dist],
            "attention_transfer": [attention_transfer],
            "factor_transfer": [factor_transfer],
            "similarity_preserving": [similarity_preserving],
            "rkd_distance": [rkd(1.0, 0.0)],
            "rkd_angle": [rkd(0.0, 1.0)],
            "pkt": [pkt],
            "activation_boundary": [activation_boundary],
            "vid": [vid],
            "hierarchical_context": [hierarchical_context],
        }


LIBRARIES = {
    "ours": Ours,
    "optax": Optax,
    "keras": KerasDistillation,
    "keras-instance": KerasDistillationOfInstance,
    "keras-losses": KerasLosses,
    "trl": Trl,
    "torchdistill": Torchdistill,
    "torch": Torch,
}
