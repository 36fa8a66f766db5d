// SPDX-License-Identifier: GPL-2.0
/*
 * DOC: Instances
 *
 * An instance is a label: an id, a name, a word for its state that user space chooses, and what is accounted to it:
 * memory objects (memory.c) and CPUs (cpus.c). The module draws no conclusion from the state.
 *
 * 1. CREATE gives it an id, never used again while the module is loaded: a stale id can only meet ENOENT.
 * 2. UPDATE changes state and image.
 * 3. DESTROY gives back its memory; EBUSY, and nothing done, while a CPU is recorded there, a PCI function is frozen
 *    for it, or its memory is in use.
 * BATON_SELF stands for the kernel that shows the list. It is not created, so not destroyed either.
 */
#include <linux/capability.h>
#include <linux/ctype.h>
#include <linux/user_namespace.h>
#include <linux/utsname.h>
#include "baton.h"

struct baton_label {
	struct list_head node;
	u32 id;
	u32 state;
	char name[BATON_NAME_LEN];
	char image[BATON_IMAGE_LEN];
};

static LIST_HEAD(labels);	/* under baton_lock */
static struct baton_label self = { .id = BATON_SELF, .state = BATON_STATE_RUNNING, .name = "self" };

static const char * const state_words[] = {
	[BATON_STATE_CREATED] = "created", [BATON_STATE_LOADED] = "loaded", [BATON_STATE_BOOTING] = "booting",
	[BATON_STATE_RUNNING] = "running", [BATON_STATE_SERVING] = "serving", [BATON_STATE_FAILED] = "failed",
	[BATON_STATE_RETIRED] = "retired",
};

static struct baton_label *find_label(u32 id)
{
	struct baton_label *label;

	lockdep_assert_held(&baton_lock);
	list_for_each_entry(label, &labels, node)
		if (label->id == id)
			return label;
	return NULL;
}

bool baton_instance_exists(u32 id)
{
	return find_label(id);
}

u32 baton_instances_count(void)
{
	guard(mutex)(&baton_lock);
	return list_count_nodes(&labels) - 1;
}

/* NUL-terminated; an image may have all that can be printed. */
static bool is_text(const char *text, size_t size, bool is_name)
{
	for (size_t i = 0; i < size; i++) {
		if (!text[i])
			return true;
		if (!isascii(text[i]) || !isprint(text[i]) ||
		    (is_name && !isalnum(text[i]) && !strchr("._+-", text[i])))
			return false;
	}
	return false;
}

int baton_instance_create(struct baton_call *call)
{
	struct baton_instance *arg = call->arg;
	struct baton_label *other;
	static u32 last_id = BATON_SELF;

	if (arg->reserved || arg->state >= ARRAY_SIZE(state_words) || !arg->name[0] ||
	    !is_text(arg->name, BATON_NAME_LEN, true) || !is_text(arg->image, BATON_IMAGE_LEN, false))
		return -EINVAL;
	struct baton_label *label __free(kfree) = kzalloc(sizeof(*label), GFP_KERNEL);
	if (!label)
		return -ENOMEM;
	guard(mutex)(&baton_lock);
	list_for_each_entry(other, &labels, node)
		if (!strcmp(other->name, arg->name))
			return -EEXIST;
	arg->id = label->id = last_id + 1;
	label->state = arg->state;
	strscpy(label->name, arg->name);
	strscpy(label->image, arg->image);
	if (baton_reply(call))
		return -EFAULT;
	last_id++;
	list_add_tail(&no_free_ptr(label)->node, &labels);
	__module_get(THIS_MODULE);
	return 0;
}

int baton_instance_update(struct baton_call *call)
{
	const struct baton_instance *arg = call->arg;
	struct baton_label *label;

	if (arg->reserved || arg->state >= ARRAY_SIZE(state_words) || !is_text(arg->image, BATON_IMAGE_LEN, false))
		return -EINVAL;
	guard(mutex)(&baton_lock);
	label = find_label(arg->id);
	if (!label)
		return -ENOENT;
	label->state = arg->state;
	if (arg->image[0])
		strscpy(label->image, arg->image);
	return 0;
}

int baton_instance_destroy(struct baton_call *call)
{
	const struct baton_instance *arg = call->arg;
	struct baton_label *label;
	int ret;

	if (arg->reserved || arg->id == BATON_SELF)
		return -EINVAL;
	guard(mutex)(&baton_lock);
	label = find_label(arg->id);
	if (!label)
		return -ENOENT;
	if (baton_cpus_recorded(label->id) || baton_functions_frozen(label->id))
		return -EBUSY;
	ret = baton_memory_give_back_all(label->id);
	if (ret)
		return ret;
	list_del(&label->node);
	kfree(label);
	module_put(THIS_MODULE);
	return 0;
}

/* Columns are apart by one blank; the image is last, since it may hold blanks. "-": none, or not for you. */
int baton_instances_show(struct seq_file *seq, void *unused)
{
	/* Like /proc/iomem: physical addresses are not for everybody. */
	bool with_addresses = file_ns_capable(seq->file, &init_user_ns, CAP_SYS_ADMIN);
	struct baton_label *label;

	guard(mutex)(&baton_lock);
	seq_puts(seq, "id name state cpus bytes ranges image\n");
	list_for_each_entry(label, &labels, node) {
		seq_printf(seq, "%u %s %s ", label->id, label->name, state_words[label->state]);
		baton_cpus_show(seq, label->id);
		seq_putc(seq, ' ');
		baton_memory_show(seq, label->id, with_addresses);
		seq_printf(seq, " %s\n", label->image[0] ? label->image : "-");
	}
	return 0;
}

void baton_instances_init(void)
{
	strscpy(self.image, init_utsname()->release);
	list_add(&self.node, &labels);
}
