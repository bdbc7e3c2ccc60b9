//! Runs the built tool.
