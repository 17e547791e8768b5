"""Thesis Figure 2.3: the training loss of K-BFGS-20 and K-BFGS(L)-20 over learning rate and
damping, on three autoencoders with minibatches of 1000.

The document's choices are those of Table 2.5. The `cpu` budget takes four of its nine learning
rates by four of its five dampings.
"""

from dataclasses import replace

from curvlab.reproduction import TunedTable, load_script, main

CHAPTER_2 = load_script("figure-2.2")
WORDS = "both K-BFGS and K-BFGS(L) are robust within a fairly wide range of hyper-parameters"

FIGURE = TunedTable(
    shows=(
        "thesis Figure 2.3: landscape of the loss of K-BFGS and K-BFGS(L) over learning rate and"
        " damping"
    ),
    claim=f"{WORDS} (2.8.2)",
    of=replace(
        CHAPTER_2,
        methods={label: CHAPTER_2.methods[label] for label in ("K-BFGS", "K-BFGS(L)")},
    ),
    grid="thesis-figure-2.3",
    coarse={"lr": (0.01, 0.1, 0.3, 1.0), "damping": (0.01, 0.1, 0.3, 1.0)},
    robust=WORDS,
)

if __name__ == "__main__":
    main(FIGURE, __file__)
