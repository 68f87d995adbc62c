"""The section ``transport``: how features and layers are brought together, of two kinds with keys of their own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from tmerge.recipe.section import Section, chosen_by, counted

__all__ = ["Apart", "Shared", "TransportSettings"]

_STRUCTURE = "shared: one residual stream for all layers, whole heads, MLP neurons as units, layers in order"


class _Carried(Section):
    """What both kinds have."""

    structure: Literal["none", "shared"]
    map: Literal["plan", "procrustes", "ridge"] = Field(
        "plan", description="what carries weights: the plan, or as rivals an orthogonal or a least-squares map"
    )
    ridge: Annotated[float, Field(gt=0)] = Field(
        0.1, description="with map: ridge, the penalty, relative to the mean variance of the features mapped from"
    )
    epsilon: Annotated[float, Field(gt=0)] = Field(0.1, description="entropic regularisation of the feature plans")
    max_iterations: Annotated[int, counted(1)] = Field(200, description="most Sinkhorn sweeps of a feature plan")
    tolerance: Annotated[float, Field(gt=0)] = Field(
        1e-6, description="largest marginal violation, relative to the marginal's own entry 1/n"
    )
    entries_kept: Annotated[int, counted(1, 1_000_000)] = Field(
        128, description="a plan's entry stays if it is among this many of its row and of its column"
    )


class Apart(_Carried):
    """Every feature of every pair of layers by itself: feature plans (Eq. 7-9), then layer plans (Eq. 10-13)."""

    structure: Literal["none"] = Field("none", description=_STRUCTURE)
    eta: Annotated[float, Field(gt=0)] = Field(0.1, description="entropic regularisation of the layer plans")
    layer_max_iterations: Annotated[int, counted(1)] = Field(1000, description="most sweeps of a layer plan")
    layer_tolerance: Annotated[float, Field(gt=0)] = Field(1e-9, description="as tolerance, of the layer plans")
    layer_cost: Literal["median-scaled", "plain"] = Field(
        "median-scaled", description="divide the shifted layer cost by its median (official code) or take it as it is"
    )
    layer_marginals: Literal["balanced", "semi-relaxed"] = Field(
        "balanced", description="semi-relaxed: a source layer may stay unused (only the target marginal is fixed)"
    )
    layers_kept: Annotated[int, counted(1, 10_000)] = Field(3, description="source layers kept per target layer")


class Shared(_Carried):
    """One correspondence for the whole model, with one source layer for each of the target's.

    `epsilon`, `max_iterations` and `entries_kept` are read with ``matching: entropic`` alone.
    """

    structure: Literal["shared"] = Field("shared", description=_STRUCTURE)
    matching: Literal["one-to-one", "entropic"] = Field(
        "one-to-one", description="the limit of epsilon towards 0, or plans at epsilon"
    )
    weights: bool = Field(True, description="neurons are matched by their weights too, beside their activations")
    signed: bool = Field(False, description="a neuron may meet another's negative, and takes its sign along")


TransportSettings = Annotated[Annotated[Apart, Tag("none")] | Annotated[Shared, Tag("shared")], chosen_by("structure")]
