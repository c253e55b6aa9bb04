"""The dashboard: one static page of plain ES modules, served by the coordinator."""
