"""Many machines: the server as a Ray Serve application, and what proves it."""
