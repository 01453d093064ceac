"""Parameters by canonical name: names, shapes and how tensor ranks share them. Free of megatron-core."""
