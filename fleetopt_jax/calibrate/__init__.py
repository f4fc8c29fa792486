"""Measurements of one engine to the laws' coefficients, with how far to trust them.

The csv file has one row per operating point of one (LLM, GPU, GPUs per instance). Of each line the first that is there:

    sequences in flight   batch | avg_batch_size | n_sequences | max_concurrency | concurrency | conc        required;
                          of the whole instance
    decode step           step_s | step_ms | median_itl_ms | median_itl | median_tpot_ms | mean_tpot_ms | mean_itl_ms |
                          median_tpot | mean_tpot | mean_itl | tok_per_s | decode_tok_per_s | output_throughput |
                          output_tput_per_gpu x tp        required; names in _ms are milliseconds, others seconds;
                          tok_per_s is of the whole instance and gives batch / tok_per_s: it must not contain prefill
    context               context_tokens | sim_mean_output_position_tokens | context_window_tokens | isl and osl |
                          input_len and output_len | total_input_tokens, total_output_tokens and completed     optional
    power of one GPU      power_w_per_gpu | avg_power_per_gpu_w | power_w / (n_gpus | num_gpus | tp)      optional
    names                 llm | model_id | model, gpu | gpu_model | hw, tp | n_gpus | num_gpus | tensor_parallel_size,
                          precision | weight_precision, task

So our own files (batch, step_ms, context_tokens, power_w_per_gpu), the ML.ENERGY benchmark's table, a context sweep
and results of `vllm bench serve` and InferenceX, a row each, are read as they are; case does not matter. Where the
step's column holds prefill (a mean, a time per output token, a throughput of the whole run) the fit says so.

Context is the mean length of a sequence in flight, prompt and output so far. ML.ENERGY's column holds the output part
only (its prompt lengths are not published): too short by the mean prompt. A sweep's window is taken as full when a
request ends: the context is the window, less half of `output_tokens_per_request` where given. ML.ENERGY's step is the
median inter-token latency, what a decode sees; its mean iteration includes prefill. Rows with images or video
(`flag_multimodal`) are left out.

Results of whole benchmarks (`vllm bench serve`, aiperf, GuideLLM, InferenceX, AIConfigurator's points, csv) are read by
`readers`, as points of a load and what was seen (`points.py`); `predict.py` says what an engine would show of each, and
`benchmarks.py` fits factors on the catalog's engine to them.

`fit_decode` and `fit_power` minimise the relative error, because a step of 10 ms and one of 100 ms matter alike;
standard errors are those of least squares, from the residuals. The cost of a context token is fitted only where a batch
was measured at two contexts a factor 1.5 apart; else it is the one given. `documents.engine` writes what was fitted to
a file, and reads it back as an engine.
"""
