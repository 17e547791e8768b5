"""Every place in the package that waits for a device, by method and step: the table of waits.

`test_pretend` holds it to what is seen on a device that is not there; `docs/devices.md` is made of
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

Table = Mapping[str, Mapping[str, Set[str]]]
"""{what: {phase: places}}."""

NONE: frozenset[str] = frozenset()


def alike(*names: str, **phases: Set[str]) -> Table:
    """The same places for every one of these."""
    return dict.fromkeys(names, phases)


PLACES: dict[str, tuple[str, str]] = {
    "closure:Closure._finite": (
        "number read",
        "whether the loss is finite, where a caller has to know at once",
    ),
    "closure:Closure._moved": (
        "copy to the device",
        "a minibatch goes over; on CUDA from pinned memory, without waiting",
    ),
    "nests:check_inputs": (
        "number read",
        "whether inputs that lie on the device already are finite",
    ),
    "curvature.fisher:DenseFisher.refresh": ("shape read", "which inputs are not zero"),
    "curvature.gradient_norm:total_norm": ("number read", "the gradient's norm, by which λ moves"),
    "curvature.hessian:least_eigenvalue": (
        "number read",
        "the least eigenvalue, which a shift follows",
    ),
    "curvature.hessian_free:HessianFree._loss_after": ("number read", "the loss of a trial step"),
    "curvature.hessian_free:HessianFree.precondition": (
        "number read",
        "the best of the trial steps",
    ),
    "curvature.kbfgs:KBfgs.update_bounds": ("number read", "a bound of what pairs do, for a probe"),
    "curvature.levenberg_marquardt:predicted_reduction": (
        "number read",
        "what the quadratic model predicts",
    ),
    "curvature.levenberg_marquardt:ratio_at": ("number read", "ρ, by which λ moves"),
    "curvature.refinement:Refinement.add": (
        "copy to the device",
        "which pairs are kept, as a list",
    ),
    "curvature.refinement:Refinement.gamma": ("number read", "the scale of the first inverse"),
    "curvature.refinement:Refinement.metric": ("number read", "the scale of a metric"),
    "curvature.shampoo:shampoo_factors": ("number read", "whether a factor is finite"),
    "curvature.skqn:SkqnB._below": ("number read", "whether a refinement is below its ceiling"),
    "curvature.skqn:SkqnB._sketched": ("copy to the device", "a sketch, drawn on the host"),
    "curvature.structured:Structured._direct": ("number read", "whether a matrix is finite"),
    "curvature.structured:Structured.update": ("number read", "the gradient's norm"),
    "curvature.whole_vector:rounding": ("number read", "how far rounding reaches, for ρ"),
    "curvature.whole_vector:subset": (
        "copy to the device",
        "which examples the curvature is of, drawn on the host",
    ),
    "derivatives:_Plain.__torch_function__": (
        "copy to the device and number read",
        "an operation written out, at the first look",
    ),
    "descent:Descent.say_left_out": ("number read", "how many pairs were left out, for a warning"),
    "exact.batches:check_independence": ("number read", "whether the weights are finite"),
    "exact.matrices:_add_general": ("copy to the device", "which columns a block has"),
    "exact.matrices:finite": ("number read", "whether a matrix is finite"),
    "exact.matrices:select": ("copy to the device", "which entries a parameter has"),
    "exact.occurring:_symbols": ("shape read", "which symbols occur"),
    "exact.products:_Whole.check": ("number read", "whether data and weights are as they were"),
    "exact.products:_between": ("copy to the device", "a part of the vector among the others"),
    "exact.sight:sees": (
        "copy to the device and number read",
        "whether `torch.func` sees what autograd sees",
    ),
    "exact.sight:sees_twice": (
        "copy to the device and number read",
        "the same of second derivatives",
    ),
    "forms:_gap": ("number read", "how near a block is to autograd, at the first look"),
    "forms:prove_form": ("copy to the device and number read", "the first look at a form"),
    "independence:Independence._check_apart": ("number read", "whether examples stand alone"),
    "independence:Independence._mixed_by_inputs": (
        "copy to the device and copy to the host and shape read",
        "whether examples act on each other",
    ),
    "independence:Independence.check_alone": ("number read", "whether examples stand alone"),
    "likelihoods.targets:wrong_targets": (
        "number read",
        "the range of targets that lie on the device already",
    ),
    "linalg.block_bfgs:_whitening": ("shape read", "the rank of a sketch"),
    "linalg.block_bfgs:bounded_factor": ("number read", "how far a pair is damped"),
    "linalg.block_bfgs:block_bfgs": ("number read", "whether a sketch is finite and definite"),
    "linalg.cholesky:damped_cholesky": ("number read", "whether a factor is finite and definite"),
    "linalg.cholesky:damped_inverse": (
        "factorisation checked",
        "an inverse from its Cholesky factor",
    ),
    "linalg.cholesky:damped_reciprocal": ("number read", "whether a diagonal is finite"),
    "linalg.cholesky:shift_to_definite": (
        "number read",
        "whether a matrix is definite, or with which shift",
    ),
    "linalg.distances:compare_to_exact": ("number read", "an error"),
    "linalg.distances:distance": ("number read", "an error"),
    "linalg.distances:inner": ("number read", "an inner product"),
    "linalg.eigenbasis:eigenbasis": ("number read", "whether factors are finite"),
    "linalg.eigenbasis:largest_eigenvalue": ("number read", "how large a refinement may be"),
    "linalg.eigenbasis:shifted_kronecker": ("number read", "whether factors are finite"),
    "linalg.kronecker:pi_split": ("number read", "the two traces of the π split"),
    "linalg.krylov:_check_vector": ("number read", "whether a vector is finite"),
    "linalg.krylov:_quadratic": ("number read", "the quadratic model at an iterate"),
    "linalg.krylov:lanczos": ("number read", "whether a recurrence has ended"),
    "linalg.krylov:truncated_cg": ("number read", "whether conjugate gradients have ended"),
    "linalg.lbfgs:Memory.append_where": (
        "number read",
        "whether a pair was taken, until the memory is full",
    ),
    "linalg.lbfgs:_scaled": ("number read", "whether sᵀy is above 0"),
    "linalg.operators:Dense.inv": ("number read", "whether a matrix is definite"),
    "linalg.operators:Diagonal.inv": ("number read", "whether a diagonal is positive"),
    "linalg.operators:_positive_eigenvalues": ("number read", "how many eigenvalues are positive"),
    "linalg.packed:fold": ("shape read", "which inputs are not zero"),
    "linalg.pairs:Pair.skipped": ("number read", "whether a pair is refused"),
    "linalg.products:finite_product": ("number read", "whether a product is finite"),
    "linalg.roots:inverse_root_eigh": ("number read", "whether a factor is finite"),
    "linalg.roots:inverse_root_newton": ("number read", "whether Newton's iteration has ended"),
    "linalg.spectral:_converging": ("factorisation checked", "an eigendecomposition"),
    "looks:Looks._settle": ("number read", "whether outputs are finite, at the first look"),
    "probes.against_exact:_reduction": ("number read", "a reduction"),
    "probes.against_exact:_spectrum": ("copy to the device", "a random start, from the host"),
    "probes.against_exact:own_quadratic": ("number read", "a quadratic form"),
    "probes.against_exact:ritz": ("copy to the device", "a random start, from the host"),
    "probes.base:Frame.gram": ("copy to the host", "all inner products, in one copy"),
    "probes.base:on_host": ("copy to the host", "what was measured, for the log"),
    "probes.bounds:ends": ("number read", "extreme eigenvalues"),
    "probes.bounds:input_bounds": ("number read", "the largest input"),
    "probes.damping:_damping": (
        "copy to the device",
        "numbers of the host among those of the device",
    ),
    "probes.damping:_together": (
        "copy to the device",
        "numbers of the host among those of the device",
    ),
    "second_looks:SecondLooks._stands": ("number read", "whether the weights are as they were"),
    "second_looks:_apart": ("number read", "whether two looks agree, at the first look"),
    "sent_vectors:SortedVectors.of": ("number read and shape read", "which vectors are zero"),
    "sent_vectors:_fewer": ("number read", "how many vectors are left"),
    "soundness:check_direction": (
        "copy to the host",
        "the direction's length, which a sample reads at once",
    ),
    "units:ByPlace.where": ("number read", "which places have a loss"),
}

"""{module:function: (what waits, what is asked)}."""
WARM = frozenset({"closure:Closure._finite", "closure:Closure._moved"})
DATA = frozenset({"nests:check_inputs", "likelihoods.targets:wrong_targets"})
CG = frozenset(
    {
        "curvature.hessian_free:HessianFree._loss_after",
        "curvature.hessian_free:HessianFree.precondition",
        "linalg.krylov:_check_vector",
        "linalg.krylov:_quadratic",
        "linalg.krylov:truncated_cg",
        "linalg.products:finite_product",
    }
)
KRONECKER = frozenset({"linalg.eigenbasis:shifted_kronecker", "linalg.operators:Diagonal.inv"})
LANCZOS = frozenset(
    {
        "linalg.krylov:_check_vector",
        "linalg.krylov:lanczos",
        "linalg.products:finite_product",
        "probes.against_exact:ritz",
    }
)
FIRST_LOOK = frozenset({"forms:_gap", "forms:prove_form", "looks:Looks._settle"})
SECOND_LOOK = frozenset({"second_looks:_apart"})
FACTOR = frozenset({"linalg.cholesky:damped_cholesky"})
INVERSE = frozenset({"linalg.cholesky:damped_cholesky", "linalg.cholesky:damped_inverse"})
EIGEN = frozenset({"linalg.spectral:_converging"})
EIGENBASIS = frozenset({"linalg.eigenbasis:eigenbasis"})
PAIRED = EIGEN | {
    "linalg.kronecker:pi_split",
    "linalg.lbfgs:_scaled",
    "linalg.operators:Diagonal.inv",
    "linalg.operators:_positive_eigenvalues",
    "linalg.pairs:Pair.skipped",
}
SKETCHED = frozenset(
    {
        "curvature.skqn:SkqnB._below",
        "linalg.block_bfgs:_whitening",
        "linalg.block_bfgs:block_bfgs",
        "linalg.block_bfgs:bounded_factor",
        "linalg.eigenbasis:largest_eigenvalue",
        "linalg.kronecker:pi_split",
    }
)
RATIO = frozenset(
    {
        "curvature.levenberg_marquardt:predicted_reduction",
        "curvature.levenberg_marquardt:ratio_at",
        "curvature.whole_vector:rounding",
    }
)
SUBSET = frozenset({"curvature.whole_vector:subset"})
SIGHT = frozenset({"exact.sight:sees"})
SIGHT_TWICE = frozenset(
    {"derivatives:_Plain.__torch_function__", "exact.sight:sees", "exact.sight:sees_twice"}
)
ALONE = frozenset({"exact.batches:check_independence", "independence:Independence.check_alone"})
ORACLE = frozenset(
    {
        "closure:Closure._finite",
        "closure:Closure._moved",
        "exact.batches:check_independence",
        "exact.matrices:finite",
        "exact.matrices:select",
        "exact.occurring:_symbols",
        "exact.products:_Whole.check",
        "exact.products:_between",
        "exact.sight:sees",
        "forms:_gap",
        "forms:prove_form",
        "independence:Independence._check_apart",
        "independence:Independence._mixed_by_inputs",
        "independence:Independence.check_alone",
        "linalg.packed:fold",
        "looks:Looks._settle",
        "second_looks:SecondLooks._stands",
        "second_looks:_apart",
    }
)
ORACLE_TWICE = frozenset(
    {
        "nests:check_inputs",
        "derivatives:_Plain.__torch_function__",
        "exact.matrices:_add_general",
        "exact.sight:sees_twice",
    }
)
STEPS: Table = {
    **alike(
        "block-fisher",
        "block-ef",
        "block-ggn",
        start=WARM | FIRST_LOOK,
        step=FACTOR | {"linalg.packed:fold"},
    ),
    **alike(
        "block-hessian",
        start=FIRST_LOOK | {"closure:Closure._moved", "independence:Independence._mixed_by_inputs"},
        step=DATA
        | FACTOR
        | EIGEN
        | ALONE
        | {
            "closure:Closure._finite",
            "curvature.hessian:least_eigenvalue",
            "exact.matrices:finite",
            "linalg.packed:fold",
            "second_looks:SecondLooks._stands",
        },
    ),
    **alike(
        "kfac",
        "kfac-ef",
        "kfac-reduce",
        "kflr",
        start=WARM | FIRST_LOOK,
        step=NONE,
        refresh=INVERSE | {"linalg.kronecker:pi_split"},
    ),
    **alike(
        "kfac-20",
        "tnt",
        "tnt-ef",
        "tnt-per-sample",
        "foof",
        start=WARM | FIRST_LOOK,
        step=NONE,
        refresh=INVERSE,
    ),
    **alike(
        "k-bfgs-20",
        "kf-bfgs-cnn",
        "k-bfgs",
        start=WARM | FIRST_LOOK | SECOND_LOOK | INVERSE,
        step=NONE,
    ),
    **alike(
        "k-bfgs-l-20",
        "kf-bfgs-l-cnn",
        "k-bfgs-l",
        start=WARM | FIRST_LOOK | SECOND_LOOK | INVERSE | {"linalg.lbfgs:Memory.append_where"},
        step=NONE,
    ),
    **alike(
        "k-bfgs-20-convergent",
        "kf-bfgs-cnn-convergent",
        "k-bfgs-convergent",
        start=WARM | FIRST_LOOK | SECOND_LOOK | {"linalg.lbfgs:Memory.append_where"},
        step=INVERSE,
    ),
    **alike(
        "tnt-ideal",
        start=FIRST_LOOK | {"closure:Closure._moved"},
        step=DATA | INVERSE | {"closure:Closure._finite"},
    ),
    **alike(
        "shampoo",
        start=WARM | FIRST_LOOK,
        step=NONE,
        refresh={"curvature.shampoo:shampoo_factors", "linalg.roots:inverse_root_newton"},
    ),
    **alike("adam", "sgd-m", "adamw", "sophia-g", "muon", start=FIRST_LOOK, step=NONE),
    **alike("rmsprop", start=WARM | FIRST_LOOK, step=NONE),
    **alike("smw-ng-bd", "smw-ng-bd-ef", start=FIRST_LOOK | SECOND_LOOK, step=RATIO | FACTOR),
    **alike("smw-ng", start=FIRST_LOOK | SECOND_LOOK, step=RATIO | SUBSET | FACTOR),
    **alike(
        "smw-gn",
        start=FIRST_LOOK | SECOND_LOOK,
        step=DATA | RATIO | SUBSET | FACTOR | {"closure:Closure._finite"},
    ),
    **alike(
        "hf",
        start=FIRST_LOOK | SECOND_LOOK | SIGHT,
        step=CG | RATIO | SUBSET | {"nests:check_inputs", "exact.batches:check_independence"},
    ),
    **alike(
        "skqn-l", start=WARM | FIRST_LOOK | SECOND_LOOK, step=PAIRED, refresh=PAIRED | EIGENBASIS
    ),
    **alike(
        "skqn-b1",
        "skqn-b2",
        start=WARM | FIRST_LOOK | SECOND_LOOK,
        step=SKETCHED | INVERSE | EIGEN,
        refresh=SKETCHED | INVERSE | EIGEN,
    ),
    **alike(
        "lbfgs",
        start=FIRST_LOOK | SECOND_LOOK,
        step={
            "curvature.refinement:Refinement.gamma",
            "curvature.structured:Structured.update",
            "linalg.lbfgs:_scaled",
            "linalg.pairs:Pair.skipped",
        },
    ),
    **alike(
        "ssn",
        start=FIRST_LOOK | SECOND_LOOK | SIGHT_TWICE | {"nests:check_inputs"},
        step=EIGEN
        | {
            "curvature.structured:Structured._direct",
            "curvature.structured:Structured.update",
            "linalg.cholesky:shift_to_definite",
            "linalg.operators:Dense.inv",
        },
    ),
    **alike(
        "s4qn",
        start=FIRST_LOOK | SECOND_LOOK | SIGHT_TWICE | {"nests:check_inputs"},
        step=EIGEN
        | {
            "curvature.refinement:Refinement.add",
            "curvature.refinement:Refinement.metric",
            "curvature.structured:Structured._direct",
            "curvature.structured:Structured.update",
            "linalg.cholesky:shift_to_definite",
            "linalg.operators:Dense.inv",
            "linalg.pairs:Pair.skipped",
        },
    ),
    **alike(
        "full-ggn",
        start=FIRST_LOOK,
        step=SECOND_LOOK
        | EIGEN
        | {
            "closure:Closure._finite",
            "curvature.structured:Structured.update",
            "linalg.operators:Diagonal.inv",
            "linalg.operators:_positive_eigenvalues",
        },
    ),
    **alike(
        "ekfac",
        start=WARM | FIRST_LOOK,
        step=NONE,
        refresh=EIGEN | {"linalg.cholesky:damped_reciprocal"},
    ),
    **alike("asgo", start=FIRST_LOOK, step=EIGEN | {"linalg.roots:inverse_root_eigh"}),
    **alike("soap", "kl-shampoo", start=FIRST_LOOK | EIGEN, step=NONE, refresh=NONE),
}

"""{algorithm: {phase: places}}: at the "start", beside those of its later steps (the first looks,
the warm start, memories that fill); at a "refresh", where inverses are not made at every step; at
any other "step".
"""
COUNTED = frozenset({"sent_vectors:SortedVectors.of", "sent_vectors:_fewer"})
OCCURRING = frozenset({"curvature.fisher:DenseFisher.refresh"})
RECIPROCAL = frozenset({"linalg.cholesky:damped_reciprocal"})
LAYERS: Table = {
    **alike("block-fisher", "block-ef", step=OCCURRING),
    **alike("block-ggn", step=COUNTED | OCCURRING),
    **alike("block-hessian", step=SECOND_LOOK),
    **alike("tnt-ideal", step=COUNTED),
    **alike("skqn-b1", "skqn-b2", step={"curvature.skqn:SkqnB._sketched"}),
    **alike("kflr", step=COUNTED, refresh=RECIPROCAL),
    **alike("kfac", "kfac-20", "kfac-ef", "foof", step=NONE, refresh=RECIPROCAL),
}
"""{algorithm: {phase: places}}: beside those of `STEPS`, on convolutions, tokens and embeddings.

`COUNTED`: which vectors of the exact labels need not be sent is read where places share a weight,
since sending all takes longer. What a step waits for a refresh may wait for too.
"""

EXACT: Table = {
    **alike("hessian", "pi", matrices=ORACLE | ORACLE_TWICE),
    **alike(
        "ggn", "fisher", matrices=ORACLE | {"sent_vectors:SortedVectors.of", "sent_vectors:_fewer"}
    ),
    **alike("fisher-mc", "ef", matrices=ORACLE | {"derivatives:_Plain.__torch_function__"}),
    **alike(
        "ef-token",
        matrices=ORACLE
        | {"sent_vectors:SortedVectors.of", "sent_vectors:_fewer", "units:ByPlace.where"},
    ),
}

"""{kind of matrix: places of all functions of `curvlab.exact` that take it}."""
SAMPLES: Mapping[str, Set[str]] = {
    "gradients": WARM | FIRST_LOOK | ALONE | {"independence:Independence._mixed_by_inputs"},
    "jacobians": {"closure:Closure._moved", "independence:Independence.check_alone"},
}
"""{function of single examples: places}."""

PROBE: Table = {
    **alike(
        "damping",
        measure={
            "linalg.pairs:Pair.skipped",
            "probes.damping:_damping",
            "probes.damping:_together",
        },
        gather={"probes.base:on_host"},
    ),
    **alike(
        "bounds",
        measure=EIGEN
        | {
            "curvature.kbfgs:KBfgs.update_bounds",
            "linalg.pairs:Pair.skipped",
            "probes.bounds:ends",
            "probes.bounds:input_bounds",
        },
        gather=NONE,
    ),
    **alike(
        "reduction",
        measure=SIGHT_TWICE
        | {
            "nests:check_inputs",
            "probes.against_exact:_reduction",
            "probes.against_exact:own_quadratic",
        },
        gather=NONE,
    ),
    **alike(
        "error",
        measure=DATA
        | FIRST_LOOK
        | EIGEN
        | ALONE
        | {
            "closure:Closure._finite",
            "exact.matrices:finite",
            "independence:Independence._mixed_by_inputs",
            "linalg.distances:compare_to_exact",
            "linalg.distances:distance",
            "linalg.distances:inner",
            "linalg.packed:fold",
            "second_looks:SecondLooks._stands",
        },
        gather=NONE,
    ),
    **alike(
        "spectrum",
        measure=LANCZOS
        | EIGEN
        | SIGHT_TWICE
        | {"nests:check_inputs", "probes.against_exact:_spectrum"},
        gather={"probes.base:on_host"},
    ),
    **alike(
        "alignment",
        measure=LANCZOS | EIGEN | SIGHT_TWICE | {"nests:check_inputs"},
        gather={"probes.base:on_host"},
    ),
    **alike("condition", measure=EIGEN | {"probes.bounds:ends"}, gather=NONE),
    **alike("memory", "time", "shift", "lambda", measure=NONE, gather=NONE),
    **alike("noise", "loss", "norms", measure=NONE, gather={"probes.base:on_host"}),
    **alike("cosine", "gram", measure={"probes.base:Frame.gram"}, gather=NONE),
}

"""{probe: places where it measures, and where its values are gathered}."""
WATCH: Mapping[str, Set[str]] = {
    "sample": DATA
    | FIRST_LOOK
    | INVERSE
    | {
        "closure:Closure._finite",
        "descent:Descent.say_left_out",
        "linalg.kronecker:pi_split",
        "probes.base:Frame.gram",
        "probes.base:on_host",
        "soundness:check_direction",
    },
    "step": NONE,
    "end": NONE,
}
"""Places of steps of a watched loop that are sampled, of others, and of the end."""

PLAIN = [
    *("sgd-m", "adam", "adamw", "rmsprop", "sophia-g", "muon", "soap", "kl-shampoo", "shampoo"),
    *("kfac", "kfac-20", "kfac-ef", "kfac-reduce", "kflr", "ekfac", "foof"),
    *("tnt", "tnt-ef", "tnt-per-sample"),
    *("k-bfgs", "k-bfgs-l", "k-bfgs-20", "k-bfgs-l-20", "kf-bfgs-cnn", "kf-bfgs-l-cnn"),
]
"""Algorithms of whose steps only refreshes may wait."""


def page() -> str:
    """The tables of `docs/devices.md`."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, phases in STEPS.items():
        key = _said(phases["step"]), _said(phases["refresh"]) if "refresh" in phases else "–"
        rows.setdefault(key, []).append(f"`{name}`")
    lines = ["| algorithms | a step waits for | a refresh for |", "|---|---|---|"]
    for (step, refresh), names in sorted(rows.items(), key=lambda row: row[0][0] != "nothing"):
        lines.append(f"| {', '.join(names)} | {step} | {refresh} |")
    lines += [
        "",
        "| algorithms | on convolutions, tokens, embeddings a step waits too for | a refresh for |",
    ]
    lines += ["|---|---|---|"]
    for name, phases in LAYERS.items():
        refresh = _said(phases["refresh"]) if "refresh" in phases else "–"
        lines += [f"| `{name}` | {_said(phases['step'])} | {refresh} |"]
    lines += ["", "| probe | its samples wait for |", "|---|---|"]
    for name, phases in PROBE.items():
        lines.append(f"| `{name}` | {_said(phases['measure'] | phases['gather'])} |")
    return "\n".join(lines) + "\n"


def _said(places: Set[str]) -> str:
    return "; ".join(dict.fromkeys(PLACES[p][1] for p in sorted(places))) or "nothing"
