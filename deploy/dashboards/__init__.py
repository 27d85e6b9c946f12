"""Grafana's dashboards as a program: each panel is a question, and the queries that answer it."""
