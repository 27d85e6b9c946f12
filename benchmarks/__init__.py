"""Side-by-side measurements of the library and the server, one command each."""
