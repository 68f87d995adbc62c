"""The tabs of the app, one file each: every `build_X(app)` lays its tab out and wires it."""
