"""Data wrangling with a language model: entity matching, data imputation, error detection and schema matching.

The tasks of Narayan, Chami, Orr, Ré, "Can Foundation Models Wrangle Your Data?" (VLDB 2023, arXiv 2205.09911), with
the authors' data layout, serialization of rows, few-shot selection and scores. ``python -m flexbatch.apps.wrangle
--help``.
"""
