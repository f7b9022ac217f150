"""The GPU suite: ``parts`` (what there is to run), ``runner``, ``workers`` (parts that are no script), ``profile``."""
