from dag_hesse.capture import capture, tap
from dag_hesse.structure import analyze_structure
