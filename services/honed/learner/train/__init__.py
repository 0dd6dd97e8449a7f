"""One trainer that knows no algorithm: accumulate, clip, step, schedule."""
