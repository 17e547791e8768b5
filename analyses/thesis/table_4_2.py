"""Thesis Table 4.2: the highest test accuracies of Figure 4.3, whose runs it shares."""

from dataclasses import replace

from curvlab.reproduction import load_script, main

FIGURE = replace(load_script("figure-4.3"), shows="thesis Table 4.2: test accuracies of Figure 4.3")

if __name__ == "__main__":
    main(FIGURE, __file__)
