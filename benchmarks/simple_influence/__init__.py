"""The whole job, n training and T test examples, scores and the top k, beside the tools people use."""
