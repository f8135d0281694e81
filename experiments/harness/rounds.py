"""The rounds of federated methods: FedAvg and FedDF, averages of unequal widths, FedMD and co-distillation."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import models
from distill_jax.compress import units
from distill_jax.teachers import kinds
from distill_jax.train import federated, sweeps
from harness.clients import Clients, Groups, RoundResult, State, in_turn, mlp


def average_parameters(
    clients: Clients,
    state: State,
    *,
    different: bool = False,
    aligned: bool = False,
    distil: bool = False,
    dtype: str = "float32",
) -> RoundResult:
    """FedAvg, or FedDF (``distil``); initial parameters may be ``different`` and their units ``aligned`` then.

    Parameters are sent in ``dtype``.
    """
    count, first = clients.run.config.clients, different and not state.step
    server = as_sent(state.model["server"], dtype)
    down = 0 if first else count * federated.payload_bytes(server)
    if first:
        start = sweeps.stack([clients.network(i) for i in range(count)])
    else:
        start = sweeps.repeat(as_sent(server, "float32"), count)
    stacked = clients.train(state, start, range(count))
    sent = as_sent(stacked, dtype)
    each = [as_sent(sweeps.take(sent, i), "float32") for i in range(count)]
    predictions = clients.predict([stacked], architectures(clients)) if distil else np.zeros(count)
    kept = federated.finite_clients(list(zip(each, predictions, strict=True)), invalid="leave out")
    if first and aligned:  # later, all begin with the server's units in their order
        largest = each[max(kept, key=lambda i: clients.sizes[i])]
        for i in kept:
            order = units.match_weights(clients.graph, each[i], largest)
            each[i] = units.permute(clients.graph, each[i], order)
    server = federated.average_models([each[i] for i in kept], [clients.sizes[i] for i in kept])
    if distil:
        server = clients.teach(server, federated.average_predictions(predictions[kept]), int(state.step))
    return RoundResult(state._replace(model={"server": server}), federated.payload_bytes(sent), down, kept)


def as_sent(model: models.Model, dtype: str) -> models.Model:
    """Converts the numbers of a model to the dtype in which they are sent, or in which one computes."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), model)


def average_widths(
    clients: Clients, state: State, *, different: bool = False, matched: bool = False
) -> RoundResult:
    """Averages unequal widths; initial parameters may be ``different`` and units ``matched`` then."""
    config, first = clients.run.config, different and not state.step
    server, own_units = state.model["server"], list(state.extra)
    shares = np.resize(config.widths, config.clients)
    each, down = [server] * config.clients, 0
    for share, members in in_turn(config.clients, config.widths):
        if first:
            start = [
                clients.network(i, mlp(config.hidden, share)).replace(apply_fn=server.apply_fn)
                for i in members
            ]
        else:
            start = [units.keep(clients.graph, server, own_units[i]) for i in members]
            down += federated.payload_bytes(start)
        stacked = clients.train(state, sweeps.stack(start), members)
        for place, i in enumerate(members):
            each[i] = sweeps.take(stacked, place)
    kept = federated.finite_clients(each, invalid="leave out")
    if first and matched:
        widest = max(kept, key=lambda i: (shares[i], clients.sizes[i]))
        # Where nobody is left that has all units, the others are the server's initial ones
        server = units.put_back(clients.graph, each[widest], own_units[widest], server)
        for i in kept:
            each[i], own_units[i] = units.match_widths(clients.graph, each[i], own_units[i], server)
    up = federated.payload_bytes(each)
    chosen: list[Any] = [[values[i] for i in kept] for values in (each, own_units, clients.sizes)]
    server = units.average_widths(clients.graph, server, *chosen)
    extra = jax.tree.map(jnp.asarray, own_units)
    return RoundResult(state._replace(model={"server": server}, extra=extra), up, down, kept)


class Agreed(NamedTuple):
    """What the server makes of the clients' predictions for the public images."""

    consensus: np.ndarray  # logits [images, classes], as the clients receive them
    bytes: int  # of what the clients send, all together, and as many back
    kept: list[int]


def agree(
    clients: Clients, stacks: Sequence[models.Model], groups: Groups, kind: kinds.Kind, of: Any
) -> Agreed:
    """Averages the predictions of all clients, each counted alike; they travel as ``kind`` in float16."""
    classes = clients.run.dataset.classes
    sent = federated.encode_predictions(clients.predict(stacks, groups), kind, invalid="leave out")
    received = [federated.dense(kind.decode(each), classes) for each in sent.values()]
    answer = kind.encode(federated.average_predictions(received, of=of), dtype="float16")
    count = clients.run.config.clients * federated.payload_bytes(answer)  # as large as what each client sends
    return Agreed(federated.dense(kind.decode(answer), classes), count, list(sent))


def exchange_predictions(
    clients: Clients, state: State, *, top: bool = False, mixed: bool = False, together: bool = True
) -> RoundResult:
    """Co-distillation, or FedMD (not ``together``), which averages logits and not probabilities."""
    groups, kind = architectures(clients, mixed), kinds.Top(clients.run.config.top) if top else kinds.Logits()
    stacks = list(state.model["clients"])
    for place, (_, members) in enumerate(groups):
        context = {"image": clients.public, **state.extra} if together else None
        if state.step and not together:  # FedMD: first the consensus, then the own images
            stacks[place] = clients.learn(state, stacks[place], state.extra["teacher"])
        stacks[place] = clients.train(state, stacks[place], members, context=context)
    agreed = agree(clients, stacks, groups, kind, "probabilities" if together else "logits")
    new = state._replace(
        model={"clients": go_on(groups, agreed.kept, stacks, state.model["clients"])},
        extra={"teacher": jnp.asarray(agreed.consensus), "weight": jnp.ones(len(agreed.consensus))},
    )
    return RoundResult(new, agreed.bytes, agreed.bytes, agreed.kept)


def go_on(
    groups: Groups, kept: Sequence[int], new: Sequence[models.Model], old: Sequence[models.Model]
) -> tuple[models.Model, ...]:
    """Takes the stacks after a round, in which clients that were left out are as they were before it."""

    def chosen(members, new, old):
        which = np.isin(members, kept)
        return jax.tree.map(
            lambda x, y: jnp.where(which.reshape(-1, *[1] * (np.ndim(x) - 1)), x, y), new, old
        )

    return tuple(chosen(members, *pair) for (_, members), *pair in zip(groups, new, old, strict=True))


def train_alone(clients: Clients, state: State) -> RoundResult:
    """Each client by itself: nothing is sent."""
    groups = architectures(clients)
    stacked = clients.train(state, state.model["clients"][0], groups[0][1])
    each = [sweeps.take(stacked, i) for i in groups[0][1]]
    kept = federated.finite_clients(each, invalid="leave out")
    return RoundResult(
        state._replace(model={"clients": go_on(groups, kept, [stacked], state.model["clients"])}), 0, 0, kept
    )


def after_alone(clients: Clients, stack: models.Model) -> dict[str, tuple[models.Model, int]]:
    """Makes one network of clients trained alone: name → (network, bytes that all clients send for it, once)."""
    each = [sweeps.take(stack, i) for i in range(clients.run.config.clients)]
    largest = each[int(np.argmax(clients.sizes))]
    aligned = [units.permute(clients.graph, c, units.match_weights(clients.graph, c, largest)) for c in each]
    agreed = agree(clients, [stack], architectures(clients), kinds.Logits(), "probabilities")
    sent = federated.payload_bytes(stack)
    return {
        "alone, averaged": (federated.average_models(each, clients.sizes), sent),
        "alone, aligned, averaged": (federated.average_models(aligned, clients.sizes), sent),
        "alone, distilled once": (clients.teach(clients.network(), agreed.consensus, 0), agreed.bytes),
    }


def architectures(clients: Clients, mixed: bool = False) -> Groups:
    """Says which clients have which network."""
    config = clients.run.config
    return in_turn(config.clients, config.mixed if mixed else [mlp(config.hidden)])


def begin(clients: Clients, model: Mapping[str, Any], extra: Any = ()) -> State:
    """Makes the state before the first round."""
    return State(jnp.zeros((), jnp.int32), jax.random.key(clients.seed), dict(model), extra)


def stacks_of(clients: Clients, mixed: bool = False) -> tuple[models.Model, ...]:
    """Makes the clients' networks before the first round, one stack per architecture."""
    return tuple(
        sweeps.stack([clients.network(i, spec) for i in members])
        for spec, members in architectures(clients, mixed)
    )


def begin_alone(clients: Clients) -> State:
    """Makes the state of clients without a server."""
    return begin(clients, {"clients": stacks_of(clients)})


def begin_parameters(clients: Clients) -> State:
    """Makes the state of a server whose clients keep nothing from round to round."""
    return begin(clients, {"server": clients.network()})


def begin_widths(clients: Clients) -> State:
    """Makes the state of a server whose clients have the first units of each group, as many as their width says."""
    shares = np.resize(clients.run.config.widths, clients.run.config.clients)
    free = {name: group.size for name, group in clients.graph.groups.items() if group.free}
    firsts = [{name: jnp.arange(math.ceil(share * n)) for name, n in free.items()} for share in shares]
    return begin(clients, {"server": clients.network()}, firsts)


def begin_predictions(clients: Clients, mixed: bool = False) -> State:
    """Makes the state of clients that have no consensus yet."""
    shape = len(clients.public), clients.run.dataset.classes
    no_consensus = {"teacher": jnp.zeros(shape), "weight": jnp.zeros(shape[0])}
    return begin(clients, {"clients": stacks_of(clients, mixed)}, no_consensus)


class Method(NamedTuple):
    """A way to learn together."""

    one_round: Callable[[Clients, State], RoundResult]
    begin: Callable[[Clients], State]
    pictures: Sequence[str] = ()  # in which its curve is drawn


def by_predictions(mixed: bool = False, **options: Any) -> Method:
    """Makes a method whose clients send predictions."""
    one_round = functools.partial(exchange_predictions, mixed=mixed, **options)
    return Method(one_round, functools.partial(begin_predictions, mixed=mixed), ("bytes.png",))


def by_parameters(*pictures: str, **options: Any) -> Method:
    """Makes a method whose clients send parameters."""
    return Method(functools.partial(average_parameters, **options), begin_parameters, pictures)


def by_widths(**options: Any) -> Method:
    """Makes a method whose clients send the parameters of unequal widths."""
    return Method(functools.partial(average_widths, **options), begin_widths, ("starts.png",))
