// SPDX-License-Identifier: GPL-2.0
/*
 * DOC: Instances
 *
 * An instance is a label: an id, a name, a word for its state that user space chooses, and what is accounted to it: memory
 * objects (memory.c) and CPUs (cpus.c). The module draws no conclusion from the state.
 *
 * 1. CREATE gives it an id, never used again while the module is loaded: a stale id can only meet ENOENT.
 * 2. UPDATE changes state and image.
 * 3. DESTROY gives back its memory; EBUSY, and nothing done, while a CPU is recorded there or its memory is in use.
 *
 * BATON_SELF stands for the kernel that shows the list. It is not created, so not destroyed either.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/capability.h>
#include <linux/ctype.h>
#include <linux/list.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
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

static struct baton_label self = {
	.id = BATON_SELF,
	.state = BATON_STATE_RUNNING,
	.name = "self",
	.node = { &self.node, &self.node },
};

/* The list's head is an element too: BATON_SELF, always first. */
#define for_each_label(label) \
	for (bool first = true; first || (label) != &self; (label) = list_next_entry(label, node), first = false)

static const char * const state_words[] = {
	[BATON_STATE_CREATED] = "created",
	[BATON_STATE_LOADED] = "loaded",
	[BATON_STATE_BOOTING] = "booting",
	[BATON_STATE_RUNNING] = "running",
	[BATON_STATE_SERVING] = "serving",
	[BATON_STATE_FAILED] = "failed",
	[BATON_STATE_RETIRED] = "retired",
};

static struct baton_label *find_label(u32 id)
{
	struct baton_label *label = &self;

	lockdep_assert_held(&baton_lock);
	for_each_label(label)
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
	u32 count;

	mutex_lock(&baton_lock);
	count = list_count_nodes(&self.node);
	mutex_unlock(&baton_lock);
	return count;
}

static bool name_is_valid(const char *name)
{
	size_t len = strnlen(name, BATON_NAME_LEN);

	for (size_t i = 0; i < len; i++)
		if (!isascii(name[i]) || (!isalnum(name[i]) && !strchr("._+-", name[i])))
			return false;
	return len > 0 && len < BATON_NAME_LEN;
}

static bool image_is_valid(const char *image)
{
	size_t len = strnlen(image, BATON_IMAGE_LEN);

	for (size_t i = 0; i < len; i++)
		if (!isascii(image[i]) || !isprint(image[i]))
			return false;
	return len < BATON_IMAGE_LEN;
}

int baton_instance_create(struct baton_call *call)
{
	struct baton_instance *arg = &call->instance;
	struct baton_label *label, *other = &self;
	static u32 last_id;
	int ret;

	if (arg->reserved || arg->state >= ARRAY_SIZE(state_words) || !name_is_valid(arg->name) ||
	    !image_is_valid(arg->image))
		return -EINVAL;
	label = kzalloc(sizeof(*label), GFP_KERNEL);
	if (!label)
		return -ENOMEM;
	label->state = arg->state;
	strscpy(label->name, arg->name, sizeof(label->name));
	strscpy(label->image, arg->image, sizeof(label->image));

	ret = mutex_lock_killable(&baton_lock);
	if (ret)
		goto free_label;
	for_each_label(other) {
		if (!strcmp(other->name, label->name)) {
			ret = -EEXIST;
			goto unlock;
		}
	}
	arg->id = label->id = last_id + 1;
	ret = baton_reply(call);
	if (ret)
		goto unlock;
	last_id++;
	list_add_tail(&label->node, &self.node);
	baton_depend();
	mutex_unlock(&baton_lock);
	return 0;

unlock:
	mutex_unlock(&baton_lock);
free_label:
	kfree(label);
	return ret;
}

int baton_instance_update(struct baton_call *call)
{
	struct baton_instance *arg = &call->instance;
	struct baton_label *label;
	int ret;

	if (arg->reserved || arg->state >= ARRAY_SIZE(state_words) || !image_is_valid(arg->image))
		return -EINVAL;
	ret = mutex_lock_killable(&baton_lock);
	if (ret)
		return ret;
	label = find_label(arg->id);
	if (label) {
		label->state = arg->state;
		if (arg->image[0])
			strscpy(label->image, arg->image, sizeof(label->image));
	}
	mutex_unlock(&baton_lock);
	return label ? 0 : -ENOENT;
}

int baton_instance_destroy(struct baton_call *call)
{
	struct baton_label *label;
	int ret;

	if (call->instance.reserved || call->instance.id == BATON_SELF)
		return -EINVAL;
	ret = mutex_lock_killable(&baton_lock);
	if (ret)
		return ret;
	label = find_label(call->instance.id);
	if (!label)
		ret = -ENOENT;
	else if (baton_cpus_recorded(label->id))
		ret = -EBUSY;
	else
		ret = baton_memory_give_back_all(label->id);
	if (!ret) {
		list_del(&label->node);
		kfree(label);
		baton_release();
	}
	mutex_unlock(&baton_lock);
	return ret;
}

/* One row an instance, columns apart by one blank, the image last since it may hold blanks; "-" is "none", or "not for you". */
int baton_instances_show(struct seq_file *seq, void *unused)
{
	/* Like /proc/iomem: physical addresses are not for everybody. */
	bool with_addresses = file_ns_capable(seq->file, &init_user_ns, CAP_SYS_ADMIN);
	struct baton_label *label = &self;
	int ret;

	ret = mutex_lock_killable(&baton_lock);
	if (ret)
		return ret;
	if (!self.image[0])
		strscpy(self.image, init_utsname()->release, sizeof(self.image));
	seq_puts(seq, "id name state cpus bytes ranges image\n");
	for_each_label(label) {
		seq_printf(seq, "%u %s %s ", label->id, label->name, state_words[label->state]);
		baton_cpus_show(seq, label->id);
		seq_putc(seq, ' ');
		baton_memory_show(seq, label->id, with_addresses);
		seq_printf(seq, " %s\n", label->image[0] ? label->image : "-");
	}
	mutex_unlock(&baton_lock);
	return 0;
}
