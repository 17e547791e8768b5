"""Thesis Figure 2.7: K-BFGS-20 with minibatches of 1000, and with the second look's gradient
averaged in, of 500 and of 1000.

The document shows "an earlier version" with another Hessian action, and no values: here Alg. 4 at
those of Table 2.5.
"""

from dataclasses import replace

from curvlab.reproduction import Claim, Comparison, Extent, load_script, main

CHAPTER_2 = load_script("figure-2.2")
PLAIN = CHAPTER_2.methods["K-BFGS"]
DOUBLE = replace(PLAIN, options={"double_grad": True})

FIGURE: Comparison = replace(
    CHAPTER_2,
    shows="thesis Figure 2.7: K-BFGS-20 and its “double-grad” variants",
    claim=(
        "Even though “double-grad” does not help much in these experiments, our K-BFGS algorithm"
        " performs stably across these different variants (2.8.3)"
    ),
    methods={
        "K-BFGS, m = 1000": PLAIN,
        "double-grad, m = 500": replace(DOUBLE, batch=500),
        "double-grad, m = 1000": DOUBLE,
    },
    paper=Extent(seconds=CHAPTER_2.paper.seconds),
    claims=[
        Claim(
            "double-grad does not help much",
            ["K-BFGS, m = 1000"],
            ["double-grad, m = 1000"],
            "time",
            within=0.1,
        ),
        Claim(
            "it performs stably across the variants",
            ["double-grad, m = 500", "double-grad, m = 1000"],
            ["K-BFGS, m = 1000"],
            "time",
            within=0.25,
            alike=True,
        ),
    ],
)

if __name__ == "__main__":
    main(FIGURE, __file__)
