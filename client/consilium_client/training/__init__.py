"""Local training. Importing this package does not import torch; its modules do."""
