"""Where a server's processor time goes: perf's samples, summed by what the code they hit is for."""
import re
import subprocess

KERNEL = "[kernel.kallsyms]"

# The first that matches a kernel function decides.
KERNEL_GROUPS = [
    ("kernel: copying", r"_?copy_(to|from)_iter|copy_(page|folio)_(to|from)_iter.*|copy_user_.*"
     r"|rep_movs.*|memcpy.*|__memcpy|memset.*|clear_page.*|clear_user.*|simple_copy_to_iter"
     r"|skb_copy_datagram.*|__skb_datagram_iter|iov_iter_.*|__import_iovec|import_.*iovec"
     r"|check_stack_object|__check_object_size|__virt_addr_valid"),
    ("kernel: memory", r".*(kmalloc|kmem_cache|slab|memcg|obj_cgroup|get_page|alloc_pages"
     r"|rmqueue|free_unref|kfree|alloc_frozen|free_frozen|page_frag|mod_.*state|kvfree|pcpu"
     r"|charge|fault|pte_|pmd_|zap_|tlb|lru_).*"),
    ("kernel: switching and waking", r"finish_task_switch.*|.*schedule.*|.*try_to_wake.*"
     r"|.*wake_up.*|_raw_spin_unlock_irq.*|pick_.*|.*enqueue_(task|entity).*"
     r"|.*dequeue_(task|entity|entit).*|update_(curr|load|rq|entity|se|cfs|min).*"
     r"|set_next_.*|put_prev_.*|.*switch_.*|ttwu_.*"
     r"|select_(task|idle).*|futex.*|.*hrtimer.*|native_.*|tick_.*|resched.*|select_idle.*"
     r"|autoremove_wake.*|prepare_to_wait.*|finish_wait|ep_.*|eventfd.*|do_epoll.*|.*poll.*"
     r"|cpu_util.*|available_idle.*|psi_.*|place_entity|avg_vruntime|vruntime_.*|rseq.*|__rseq.*"),
    ("kernel: io_uring", r"_*io_.*|.*io_uring.*|.*io_wq.*|.*iou_.*|req_.*|llist_.*|task_work_.*"),
    ("kernel: sockets", r".*(sock|skb|unix_|tcp|inet|netif|sendmsg|recvmsg|scm_|__sys_send"
     r"|__sys_recv|ip_|ipv4|nf_|loopback|net_|sk_|dev_|qdisc|process_backlog|msghdr|maybe_add_creds"
     r"|consume_|datagram).*"),
    ("kernel: files and block devices", r".*(shmem|filemap|generic_file|generic_perform|vfs_|ext4"
     r"|jbd2|iomap|bio_|blk_|blkdev|block|submit_bio|dio|loop_|lo_|xas_|xa_|folio|rw_verify"
     r"|file_|inode|fsync|touch_atime|mnt_|fsnotify|iov_|mapping|dirty|writeback|kiocb"
     r"|rw_sem|down_|up_|part_|disk|dm_|sbitmap|virt(io|queue|blk|q)|simple_write|fault_in"
     r"|balance).*"),
    ("kernel: entering and leaving", r".*(syscall|entry_SYSCALL|sysret|__x64_sys|exit_to_user"
     r"|fget|fput|fdget|irqentry).*"),
]

SWIFT_MODULES = {
    "NBDProtocol": "server: protocol and connections",
    "NBDServer": "server: protocol and connections",
    "ThinPool": "server: pool and map",
    "ThinMetadata": "server: metadata",
    "BlockIO": "server: I/O queue",
    "Control": "server: other",
    "floor": "server: protocol and connections",
}

# The first that matches the name of a shared object decides.
OBJECT_GROUPS = [
    (r"liburing.*", "server: I/O queue"),
    (r"libswift.*|ld-linux.*", "server: Swift's runtime"),
    (r"\[vdso\]", "server: clock"),
]

ORDER = [
    *[name for name, _ in KERNEL_GROUPS], "kernel: other",
    "server: protocol and connections", "server: pool and map", "server: metadata",
    "server: I/O queue", "server: copying", "server: clock", "server: Swift's runtime",
    "server: other",
]


def kernel_group(symbol):
    for name, pattern in KERNEL_GROUPS:
        if re.fullmatch(pattern, symbol):
            return name
    return "kernel: other"


def server_group(shared_object, symbol):
    for pattern, name in OBJECT_GROUPS:
        if re.fullmatch(pattern, shared_object):
            return name
    if re.match("_*mem(cpy|move|set)", symbol):
        return "server: copying"
    if symbol.startswith("clinux_"):
        return SWIFT_MODULES["BlockIO"]
    if symbol.startswith("swift_") or re.match(r"\$s(s|S)", symbol):
        return "server: Swift's runtime"
    found = re.match(r"\$s(\d+)(.*)", symbol)
    module = found.group(2)[:int(found.group(1))] if found else ""
    return SWIFT_MODULES.get(module, "server: other")


def event():
    """Cycles where the machine can count them, else the clock. With the clock, what runs with
    interrupts off is counted where they are turned on again."""
    done = subprocess.run(["perf", "stat", "-e", "cycles", "true"], capture_output=True, text=True)
    return "cpu-clock" if "not supported" in done.stderr or done.returncode else "cycles"


def recording(event, data):
    """What goes before the command to be recorded: all processors, because a server's kernel
    threads begin and end."""
    return ["perf", "record", "--quiet", "--all-cpus", "-g", "--event", event, "--freq", "4999",
            "--output", data, "--"]


def shares(data, process_id):
    """The share of the process's time in each group, and its functions by share."""
    done = subprocess.run(
        ["perf", "report", "--input", data, "--no-children", "--stdio", "--call-graph", "none",
         "--pid", str(process_id), "--sort", "dso,symbol", "--show-nr-samples",
         "--percentage", "relative", "--field-separator", "|", "--no-demangle"],
        capture_output=True, text=True, check=True)
    groups, functions, total = {}, [], 0
    for line in done.stdout.splitlines():
        fields = [field.strip() for field in line.split("|")]
        if line.startswith("#") or len(fields) < 4 or not fields[1].isdigit():
            continue
        samples, shared_object = int(fields[1]), fields[2]
        symbol = re.sub(r"^\[.\] ", "", fields[3]).partition(" ")[0]
        is_kernel = fields[3].startswith("[k]")
        group = kernel_group(symbol) if is_kernel else server_group(shared_object, symbol)
        groups[group] = groups.get(group, 0) + samples
        functions.append((samples, group, symbol))
        total += samples
    return ({name: count / total for name, count in groups.items()},
            [(count / total, group, symbol) for count, group, symbol in sorted(functions)[::-1]])
