"""What the user gets: labelled arrays with methods and standard errors, text, files, plots."""

from dag_hesse.report.files import load
from dag_hesse.report.report import CurvatureReport

__all__ = ["CurvatureReport", "load"]
