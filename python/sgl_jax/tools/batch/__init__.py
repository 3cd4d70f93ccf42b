"""Files of requests, answered without a client."""
