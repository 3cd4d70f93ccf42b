def describe(d): return ""
def draft_config(*a): raise NotImplementedError
