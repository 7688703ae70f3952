def add_arguments(p):
    pass


def run(g):
    pass
