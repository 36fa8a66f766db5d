# The yield page: where the last CPU of a kernel that has handed over waits for what becomes of the successor.
#
# On entry  (offset 0): 64-bit mode; rsi = YieldArgs, identity-mapped and writable; rdi = where to go back to; interrupts
#           off. The tables map this page and the arguments by identity and, if the kernel shall survive an NMI
#           meanwhile, that kernel's own half. The APIC's page is identity-mapped (xAPIC mode).
# On exit   to rdi (resume, dead man): rax, rcx, rdx, r8-r11 and the arithmetic flags changed, nothing else: same
#           CR3, same rsp, no stack used. Or to the park page: likewise.
#
# The kernel whose CPU this is comes back, so its descriptor tables, segment bases and stack are left alone.
#
# Label prefix: yield_.  Registers: r8 = heartbeat last seen, r9 = TSC at the last look, r10 = silence counted,
# r11 = command last seen.

    .pushsection .rodata.trampoline_yield, "a", @progbits
    .balign {page_size}
    .globl  trampoline_yield_page
    .type   trampoline_yield_page, @object
trampoline_yield_page:

    .code64
yield_entry:
    endbr64                                         # the kernel may have indirect-branch tracking on
    cli
    movl    ${step_watch}, {epitaph_step}(%rsi)
    movq    {heartbeat}(%rsi), %r8
    rdtsc
    shlq    $32, %rdx
    orq     %rax, %rdx
    movq    %rdx, %r9
    xorl    %r10d, %r10d

yield_look:
    pause
    movq    {command}(%rsi), %r11
    cmpq    ${command_resume}, %r11
    je      yield_resume
    cmpq    ${command_park}, %r11
    je      yield_park
    rdtsc                                           # time first, heartbeat second: a stall between the two can only
    lfence                                          # make the silence look shorter
    shlq    $32, %rdx
    orq     %rax, %rdx                              # rdx = now
    movq    %rdx, %rcx
    subq    %r9, %rcx                               # rcx = since the last look
    movq    %rdx, %r9
    movq    {heartbeat}(%rsi), %rax
    cmpq    %r8, %rax
    jne     yield_beat
    movq    {deadline}(%rsi), %rdx
    testq   %rdx, %rdx
    jz      yield_beat                              # no dead-man switch, or not yet: count from when there is one
    movq    %rdx, %rax
    shrq    $4, %rax
    incq    %rax
    cmpq    %rax, %rcx                              # a look counts for a sixteenth of the deadline at most: when this
    cmovaq  %rax, %rcx                              # CPU stood still, the successor may have too
    addq    %rcx, %r10
    cmpq    %rdx, %r10
    jb      yield_look

    movl    ${command_fired}, %ecx                  # from here on no command is taken; whoever gives one at this
    movq    %r11, %rax                              # moment, by compare-and-exchange, learns that it is too late
    lock cmpxchgq %rcx, {command}(%rsi)
    je      yield_fence
    jmp     yield_look                              # it was in time: look what it is

yield_beat:
    movq    %rax, %r8                               # (without a deadline: possibly no heartbeat; the same value then)
    xorl    %r10d, %r10d
    jmp     yield_look

yield_fence:
    movl    ${step_fence}, {epitaph_step}(%rsi)
    movq    %r10, {silence}(%rsi)
    movl    ${max_fence}, %r8d
    movq    {fence_count}(%rsi), %rax
    cmpq    %r8, %rax
    cmovbq  %rax, %r8                               # r8 = how many; the list ends with the page, whatever it says
    xorl    %r9d, %r9d                              # r9 = which
    movl    ${msr_apic_base}, %ecx                  # ask the APIC for its mode rather than believe an argument
    rdmsr
    btl     ${apic_base_extd_bit}, %eax
    jc      yield_x2apic

    shlq    $32, %rdx
    orq     %rax, %rdx
    andq    $-{page_size}, %rdx                     # rdx = the APIC's page
yield_xapic_next:
    cmpq    %r8, %r9
    jae     yield_fenced
    movl    {fence_ids}(%rsi,%r9,4), %eax
    incq    %r9
    cmpl    $0xff, %eax                             # 0xff is everybody here, and more does not fit
    jae     yield_xapic_next
    movl    %eax, {epitaph_apic_id}(%rsi)
    movl    ${icr_patience}, %ecx                   # a CPU that takes no interrupt must not keep the others from being
yield_xapic_busy:                                   # stopped, nor this one from going back
    decl    %ecx
    jz      yield_xapic_send
    pause
    testl   ${icr_pending}, {xapic_icr_low}(%rdx)   # what the kernel was sending when it left
    jnz     yield_xapic_busy
yield_xapic_send:
    shll    $24, %eax
    movl    %eax, {xapic_icr_high}(%rdx)
    movl    ${icr_init}, {xapic_icr_low}(%rdx)
    movl    ${icr_patience}, %ecx
yield_xapic_sent:
    decl    %ecx
    jz      yield_xapic_next
    pause
    testl   ${icr_pending}, {xapic_icr_low}(%rdx)
    jnz     yield_xapic_sent                        # the kernel must not be back before its successor has stopped
    jmp     yield_xapic_next

yield_x2apic:
    mfence                                          # MSR writes of the x2APIC are not ordered after stores
    lfence
    movl    ${msr_x2apic_icr}, %ecx
yield_x2apic_next:
    cmpq    %r8, %r9
    jae     yield_fenced
    movl    {fence_ids}(%rsi,%r9,4), %edx
    incq    %r9
    movl    %edx, {epitaph_apic_id}(%rsi)
    movl    ${icr_init}, %eax
    wrmsr                                           # there is no delivery status to wait for in this mode
    jmp     yield_x2apic_next

yield_fenced:
    movq    ${reason_dead_man}, {reason}(%rsi)
    movl    ${step_back}, {epitaph_step}(%rsi)
    jmp     *%rdi

yield_resume:
    movq    %r10, {silence}(%rsi)
    movq    ${reason_resumed}, {reason}(%rsi)
    movl    ${step_back}, {epitaph_step}(%rsi)
    jmp     *%rdi

yield_park:
    movq    %r10, {silence}(%rsi)
    movl    ${step_gone}, {epitaph_step}(%rsi)
    jmp     *{park_entry}(%rsi)

    .org    trampoline_yield_page + {page_size}
    .size   trampoline_yield_page, {page_size}
    .popsection
