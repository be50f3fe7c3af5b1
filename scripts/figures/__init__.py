"""The paper's figures, and the runs behind them."""
