"""Thesis Table 3.6: the widths of Table 2.4 again."""

from curvlab.reproduction import load_script, main

FIGURE = load_script("table-2.4")

if __name__ == "__main__":
    main(FIGURE, __file__)
