"""Rivals: how others carry what a large model learned into a smaller one, each written from its paper.

A task vector, or a LoRA's B A, is D (out, in) of a base's layer; D_t what is added to the target's layer. All are told
which layer answers to which.

    theseus           arXiv 2602.12952: D_t = T_out D T_in', T the orthogonal Procrustes maps of the activations, not
                      centred and not whitened (the published configuration), on either side of each projection
    cross-lora        arXiv 2508.05232: D_t = U_t U_s' D V_s V_t', the leading singular vectors of both models' own
                      weights, paired by their rank
    lorasuite         arXiv 2505.13515, before its training: the stream by E_s^+ E_t of the two embeddings, MLP neurons
                      by the up projections, heads by the cosine of their weights
    weight-matching   Git Re-Basin (arXiv 2209.04836, section 3.2) with rectangular assignments, so that a narrower
                      model takes a part of the wider one's neurons: stream, heads, neurons in turn, until nothing moves
    pad, procrustes   as proposed for mergekit (its issue 708): what is too large is cut off, what is too small padded
                      with zeros, and D turned by the rotation that brings the base's weight nearest to the target's
    copy              D as it is, where the shapes are the base's
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from tests.bench.pair import ALL, Pair
from tmerge.fusion import COLUMN_PROJECTIONS, TransportedNeurons

# Singular vectors of Cross-LoRA.
SUBSPACE = 320


class Rivals:
    """Other ways to carry what a source learned, each told the true layers."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.layers = pair.truth["layers"]
        self.own, self.base, self.source = (pair.layouts[role] for role in ("target", "base", "source"))

    def items(self, change: Callable[[int, int, str], Tensor]) -> list[TransportedNeurons]:
        """What a way gives for each (target layer, base layer, projection)."""
        items = []
        for layer, views in enumerate(self.own.layers):
            for name in ALL:
                weight = change(layer, self.layers[layer], name)
                neurons = torch.arange(weight.shape[name in COLUMN_PROJECTIONS])
                assert weight.shape == (views[name].out_features, views[name].in_features)
                items.append(TransportedNeurons(layer, name, neurons, weight.contiguous(), None, True))
        return items

    def learned(self, layer: int, name: str) -> Tensor:
        """(out, in) B A of the base's layer."""
        return self.source.layers[layer][name].weight() - self.base.layers[layer][name].weight()

    def ways(self) -> Mapping[str, Callable[[], list[TransportedNeurons]]]:
        """Name -> what a rival gives."""
        ways = {
            "theseus": self.theseus,
            "cross-lora": self.cross_lora,
            "lorasuite": self.lorasuite,
            "weight-matching": self.weight_matching,
            "pad": self.padded,
            "procrustes": lambda: self.padded(turned=True),
        }
        shapes = [
            [tuple(view.weight().shape) for layer in layout.layers for view in layer.values()]
            for layout in (self.own, self.base)
        ]
        return ways | ({"copy": self.copy} if shapes[0] == shapes[1] else {})

    def copy(self) -> list[TransportedNeurons]:
        return self.items(lambda layer, other, name: self.learned(other, name))

    def cross_lora(self) -> list[TransportedNeurons]:
        def change(layer: int, other: int, name: str) -> Tensor:
            left, right = [], []
            for weight in (self.own.layers[layer][name].weight(), self.base.layers[other][name].weight()):
                outputs, _, inputs = torch.linalg.svd(weight.float(), full_matrices=False)
                left.append(outputs)
                right.append(inputs)
            rank = min(SUBSPACE, *(len(vectors) for vectors in right))
            up, down = (left[index][:, :rank] for index in (0, 1)), (right[index][:rank] for index in (0, 1))
            (own_out, out), (own_in, into) = tuple(up), tuple(down)
            return own_out @ (out.T @ self.learned(other, name) @ into.T) @ own_in

        return self.items(change)

    def lorasuite(self) -> list[TransportedNeurons]:
        embeddings = [self.pair.models[role].model.get_input_embeddings().weight.float() for role in ("base", "target")]
        stream = torch.linalg.lstsq(embeddings[0], embeddings[1]).solution  # (h_s, h_t)
        dim = self.pair.models["base"].model.config.head_dim
        made: dict[tuple[int, str], Tensor] = {}

        def neurons(layer: int, other: int) -> Tensor:
            """(i_t, i_s): W_up of the target by the base's."""
            if (layer, "mlp") not in made:
                read = self.base.layers[other]["up"].weight() @ stream
                made[layer, "mlp"] = torch.linalg.lstsq(read.T, self.own.layers[layer]["up"].weight().T).solution.T
            return made[layer, "mlp"]

        def heads(layer: int, other: int, name: str) -> list[int]:
            read = (self.base.layers[other][name].weight() @ stream).unflatten(0, (-1, dim)).flatten(1)
            own = self.own.layers[layer][name].weight().unflatten(0, (-1, dim)).flatten(1)
            cosine = nn.functional.normalize(own, dim=1) @ nn.functional.normalize(read, dim=1).T
            return linear_sum_assignment(-cosine.numpy())[1].tolist()

        def change(layer: int, other: int, name: str) -> Tensor:
            learned = self.learned(other, name)
            if name in ("gate", "up"):
                return neurons(layer, other) @ learned @ stream
            if name == "down":
                return stream.T @ learned @ neurons(layer, other).T
            if name == "o":
                chosen = learned.unflatten(1, (-1, dim))[:, heads(layer, other, "q")].flatten(1)
                return stream.T @ chosen
            return learned.unflatten(0, (-1, dim))[heads(layer, other, name)].flatten(0, 1) @ stream

        return self.items(change)

    def theseus(self) -> list[TransportedNeurons]:
        stores = [self.pair.store(role, "tokens") for role in ("target", "source")]
        maps: dict[tuple[int, str], Tensor] = {}

        def aligned(layer: int, other: int, key: str) -> Tensor:
            """(n_t, n_s), orthonormal along the shorter side: the T of largest <X_t T, X_s>."""
            if (layer, key) not in maps:
                own, theirs = stores[0].get(layer, key).float(), stores[1].get(other, key).float()
                left, _, right = torch.linalg.svd(own.T @ theirs, full_matrices=False)
                maps[layer, key] = left @ right
            return maps[layer, key]

        def change(layer: int, other: int, name: str) -> Tensor:
            before = {"o": "o.pre", "down": "down.pre", "gate": "mlp.pre", "up": "mlp.pre"}.get(name, "qkv.pre")
            out, into = aligned(layer, other, f"{name}.post"), aligned(layer, other, before)
            return out @ self.learned(other, name) @ into.T

        return self.items(change)

    def padded(self, *, turned: bool = False) -> list[TransportedNeurons]:
        def change(layer: int, other: int, name: str) -> Tensor:
            own = self.own.layers[layer][name].weight().float()
            learned, theirs = (
                _of_shape(weight, own.shape)
                for weight in (self.learned(other, name), self.base.layers[other][name].weight().float())
            )
            if turned:
                left, _, right = torch.linalg.svd(theirs.T @ own, full_matrices=False)
                learned = learned @ (left @ right)
            return learned

        return self.items(change)

    def found_by_weights(self) -> dict[str, float]:
        """The share of neurons for which weight matching finds the true one, as `Pair.found` has it."""
        found, truth = matched_by_weights(self.pair), self.pair.truth
        pairs = {
            name: [
                (mine, true)
                for own, theirs in zip(found["indices"], truth["indices"], strict=True)
                for mine, true in zip(own[name], theirs[name], strict=True)
            ]
            for name in found["indices"][0]
        } | {"stream": list(zip(found["residual"], truth["residual"], strict=True))}
        return {name: sum(mine == true for mine, true in of) / len(of) for name, of in pairs.items()}

    def weight_matching(self) -> list[TransportedNeurons]:
        return _carried_by(self.pair, matched_by_weights(self.pair))


def _of_shape(weight: Tensor, shape: torch.Size) -> Tensor:
    rows, columns = (min(sizes) for sizes in zip(weight.shape, shape, strict=True))
    fitted = torch.zeros(shape)
    fitted[:rows, :columns] = weight[:rows, :columns]
    return fitted


def _carried_by(pair: Pair, found: dict[str, Any]) -> list[TransportedNeurons]:
    """As `Pair.oracle` carries through the truth, through a correspondence that was found."""
    truth, pair.truth = pair.truth, found
    try:
        return pair.oracle(ALL, False, "task-vector")
    finally:
        pair.truth = truth


def matched_by_weights(pair: Pair, rounds: int = 20) -> dict[str, Any]:
    """The correspondence whose weights agree most: coordinate ascent over stream, heads and neurons.

    Each in turn is assigned at its best given the others: sum <W_t, P_out W_s P_in'> over the weights that it touches.
    It begins with the stream by the embeddings alone, which are of one vocabulary.
    """
    own, base = pair.layouts["target"].layers, pair.layouts["base"].layers
    dim = pair.models["base"].model.config.head_dim
    embeddings = [pair.models[role].model.get_input_embeddings().weight.float() for role in ("target", "base")]
    of_embeddings = embeddings[0].T @ embeddings[1]
    stream = _assigned(of_embeddings)
    layers: list[int] = pair.truth["layers"]
    indices: list[dict[str, list[int]]] = []
    for _ in range(rounds):
        before, agreement = stream, of_embeddings.clone()
        indices = []
        for layer, other in enumerate(layers):
            mine, theirs = _weights(own[layer]), _weights(base[other])
            indices.append(_matched_layer(mine, theirs, stream, dim))
            for name in ALL:
                at = torch.tensor(indices[-1]["mlp" if name in ("gate", "up", "down") else name])
                if name in COLUMN_PROJECTIONS:
                    agreement += mine[name] @ theirs[name][:, at].T
                else:
                    agreement += mine[name].T @ theirs[name][at]
        stream = _assigned(agreement)
        if torch.equal(stream, before):
            break
    return {"layers": layers, "indices": indices, "residual": stream.tolist()}


def _assigned(agreement: Tensor) -> Tensor:
    """(n_t,) of each row the column that it is assigned, each column once at most."""
    return torch.tensor(linear_sum_assignment(agreement.numpy(), maximize=True)[1])


def _weights(views: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: views[name].weight().float() for name in ALL}


def _matched_layer(
    mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], stream: Tensor, dim: int
) -> dict[str, list[int]]:
    """Neurons of one layer, given the stream's: MLP neurons, and key-value heads with their query heads and values."""
    mlp = mine["down"].T @ theirs["down"][stream]
    for name in ("gate", "up"):
        mlp += mine[name] @ theirs[name][:, stream].T

    def by_heads(products: Tensor) -> Tensor:
        """(heads_t, heads_s, dim, dim)"""
        return products.unflatten(0, (-1, dim)).unflatten(2, (-1, dim)).transpose(1, 2)

    queries, keys, values = (by_heads(mine[name] @ theirs[name][:, stream].T) for name in ("q", "k", "v"))
    outputs = by_heads(mine["o"].T @ theirs["o"][stream])
    # Within a head the rotary frequencies fix which pair of q and k is which; values are free.
    of_queries, of_keys = (products.diagonal(dim1=2, dim2=3).sum(2) for products in (queries, keys))
    group_t, group_s = (queries.shape[side] // keys.shape[side] for side in (0, 1))
    best: dict[tuple[int, int], tuple[list[int], Tensor]] = {}
    score = of_keys.clone()
    for a in range(keys.shape[0]):
        for b in range(keys.shape[1]):
            inside = of_queries[a * group_t : (a + 1) * group_t, b * group_s : (b + 1) * group_s]
            places = _assigned(inside)
            heads = (b * group_s + places).tolist()
            of_values = values[a, b] + outputs[range(a * group_t, a * group_t + len(heads)), heads].sum(0)
            inner = _assigned(of_values)
            best[a, b] = heads, inner
            score[a, b] += inside.gather(1, places[:, None]).sum() + of_values.gather(1, inner[:, None]).sum()
    found: dict[str, list[int]] = {"q": [], "k": [], "v": [], "o": [], "mlp": _assigned(mlp).tolist()}
    for a, b in enumerate(_assigned(score).tolist()):
        heads, inner = best[a, b]
        found["k"] += range(b * dim, (b + 1) * dim)
        found["v"] += (b * dim + inner).tolist()
        for head in heads:
            found["q"] += range(head * dim, (head + 1) * dim)
            found["o"] += (head * dim + inner).tolist()
    return found
