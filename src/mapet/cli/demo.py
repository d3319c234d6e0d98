"""``mapet demo``."""
def add_parser(verbs):
    pass
