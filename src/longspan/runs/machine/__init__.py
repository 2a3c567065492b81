"""``longspan env --check``: do these machines exchange, compute and train correctly, and is one slow?"""
