"""The paper's experiments and the demo: ``python -m dag_hesse.experiments NAME``."""
