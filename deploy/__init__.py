"""What an operator puts around the server: dashboards, rules, manifests, and their drills."""
