"""Parts of the command line: what a SPEC stands for, products, shell completion, what is printed."""
