def write_page(p, r):
    pass
