"""The demo: pre-train on a small real data set, then measure the gain."""
