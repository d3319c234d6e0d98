"""``mapet convert``: read a checkpoint of MaPeT's authors."""
