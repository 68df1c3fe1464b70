"""The benchmark: questions, methods, the loop, its rows, every metric once, tables, page, peers, predictions."""
