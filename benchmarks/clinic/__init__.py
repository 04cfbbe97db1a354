"""The clinic: small programs that failed for real people, healthy ones beside them, and what bnwatch says of each."""
