"""How a person looks at an OP-DAG: a table by module, JSON, DOT and a self-contained HTML page. Never imports torch."""

from dag.views.diagram import as_html
from dag.views.dot import as_dot
from dag.views.json_form import as_json
from dag.views.table import as_table

__all__ = ["as_dot", "as_html", "as_json", "as_table"]
