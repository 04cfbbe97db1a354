"""The page of each rule, installed as ``bnwatch.pages``: ``bnwatch explain`` prints it."""
