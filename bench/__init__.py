"""Measurements that anyone can repeat: one set of conditions, results as committed JSON, tables in the docs made from them."""
