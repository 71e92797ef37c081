"""The tests. A package, so that `tests.support` is this one whatever else is installed."""
