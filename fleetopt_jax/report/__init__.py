"""Answers for people: tables, figures and files. The only room that leaves SI units."""
